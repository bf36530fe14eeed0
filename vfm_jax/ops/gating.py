"""Weigh a set of prompts or experts by noisy logits (noisy top-k gating).

Shazeer et al. 2017 (arXiv:1701.06538), section 2.1 and appendix A. Logits are
[..., n], float32.
"""

import jax
import jax.numpy as jnp


def mix(logits: jax.Array, count: int) -> jax.Array:
  """Return weights [..., n]: softmax over the `count` largest logits, else 0.

  Exactly `count` weights are positive and they add up to 1; of equal logits
  the first are taken (arXiv:1701.06538, eqs. 3 and 5).

  Args:
    logits: [..., n].
    count: how many are chosen, 1 to n.

  Raises:
    ValueError: `count` lies outside of 1 .. n.
  """
  n = logits.shape[-1]
  if not 1 <= count <= n:
    raise ValueError(f'expected a count from 1 to {n}, found {count}')
  if count == n:
    return jax.nn.softmax(logits, -1)
  top, places = jax.lax.top_k(logits, count)
  weights = jnp.zeros_like(logits)
  return jnp.put_along_axis(
    weights, places, jax.nn.softmax(top, -1), axis=-1, inplace=False
  )


def chance(
  clean: jax.Array, noisy: jax.Array, std: jax.Array, count: int
) -> jax.Array:
  """Return how likely each is chosen if its own noise is drawn again.

  P = Phi((clean - threshold) / std), where the threshold is the `count`-th
  largest of the other noisy logits (arXiv:1701.06538, eqs. 8 and 9).

  Args:
    clean: [..., n] logits without noise.
    noisy: [..., n] logits with it.
    std: [..., n] standard deviation of the noise, positive.
    count: how many are chosen, 1 to n - 1.

  Raises:
    ValueError: `count` lies outside of 1 .. n - 1.
  """
  n = clean.shape[-1]
  if not 1 <= count < n:
    raise ValueError(f'expected a count from 1 to {n - 1}, found {count}')
  top, _ = jax.lax.top_k(noisy, count + 1)
  last, following = top[..., -2, None], top[..., -1, None]
  threshold = jnp.where(noisy > following, following, last)
  return jax.scipy.stats.norm.cdf((clean - threshold) / std)


def cv_squared(x: jax.Array) -> jax.Array:
  """Return the squared coefficient of variation [...] over the last axis.

  Variance over squared mean (arXiv:1701.06538, eqs. 7 and 11); 0 where all
  entries are alike, zeros too.

  Args:
    x: [..., n], not negative.
  """
  return x.var(-1) / (jnp.square(x.mean(-1)) + 1e-10)
