"""Weigh a binary cross entropy by how wrong the prediction is."""

import jax
import jax.numpy as jnp


def sigmoid_focal(
  logits: jax.Array,
  targets: jax.Array,
  *,
  alpha: float | None = 0.25,
  gamma: float = 2.0,
) -> jax.Array:
  """Return the focal loss of each entry, float32, in the shape of `logits`.

  With p = sigmoid(x) and p_t = p y + (1 - p)(1 - y): alpha_t (1 - p_t)^gamma
  BCE(x, y) (Lin et al. 2017, equation 5); for soft y all three factors are
  taken in their linear form, as ActionFormer's label smoothing needs it.

  Args:
    logits: [...].
    targets: [...] in [0, 1].
    alpha: weight of y = 1, and 1 - alpha of y = 0; None weighs both alike.
    gamma: 0 is the plain cross entropy.
  """
  x, y = logits.astype(jnp.float32), targets.astype(jnp.float32)
  p = jax.nn.sigmoid(x)
  cross_entropy = jnp.maximum(x, 0) - x * y + jnp.log1p(jnp.exp(-jnp.abs(x)))
  p_t = p * y + (1 - p) * (1 - y)
  loss = cross_entropy * (1 - p_t) ** gamma
  return loss if alpha is None else loss * (alpha * y + (1 - alpha) * (1 - y))
