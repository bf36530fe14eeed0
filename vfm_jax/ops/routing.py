"""Give each noise level its own channels: masks of denoising task routing.

Park et al. 2023 (arXiv:2310.07138), section 4: a window of channels that
slides with the noise level, so that neighbouring levels share most of their
channels, and noisy ones have more of their own. No parameters.
"""

import jax
import jax.numpy as jnp
import numpy as np

from vfm_jax.ops.process import NOISE_LEVELS


def width_of(channels: int, beta: float) -> int:
  """Return how many channels are active at each level: floor(beta channels).

  The product is taken in float64 and cut as it is, as in the released code:
  0.29 of 100 channels are 28.

  Raises:
    ValueError: beta is not in (0, 1], or leaves no channel.
  """
  width = int(channels * beta)
  if not 0 < beta <= 1 or not width:
    raise ValueError(
      'expected `denoiser.hooks.mask.beta` in (0, 1], and at least one active '
      f'channel, found {beta:g} of {channels}'
    )
  return width


def starts(
  channels: int,
  width: int,
  *,
  alpha: float = 4.0,
  levels: int = NOISE_LEVELS,
) -> np.ndarray:
  """Return the first active channel int64 [levels] of each noise level.

  round((t / (levels - 1))^alpha (channels - width)), halves to even: the
  cleanest level has the first channels, the noisiest the last.

  Args:
    channels: number of channels.
    width: active ones.
    alpha: above 1 the window moves slowly at first.
    levels: number of noise levels.
  """
  place = np.linspace(0, 1, levels) ** alpha
  return np.round(place * (channels - width)).astype(np.int64)


def sliding_window(
  channels: int,
  width: int,
  *,
  alpha: float = 4.0,
  levels: int = NOISE_LEVELS,
) -> np.ndarray:
  """Return the masks bool [levels, channels] of windows at their `starts`."""
  first = starts(channels, width, alpha=alpha, levels=levels)[:, None]
  channel = np.arange(channels)
  return (channel >= first) & (channel < first + width)


def select_window(
  tau: jax.Array, channels: int, width: int, *, alpha: float = 4.0
) -> jax.Array:
  """Return the rows [B, channels] of `sliding_window` for levels int32 [B].

  Made from the starts alone: a table of all masks would be a large constant.
  """
  first = jnp.asarray(starts(channels, width, alpha=alpha), jnp.int32)
  first = first[tau][:, None]
  channel = jnp.arange(channels)
  return (channel >= first) & (channel < first + width)


def select_random(
  tau: jax.Array,
  channels: int,
  width: int,
  *,
  layer: int | jax.Array,
  seed: int = 0,
) -> jax.Array:
  """Return masks bool [B, channels] with any `width` channels, all alike.

  The baseline of the paper (R-TR, section 5): a mask is drawn once for each
  block and level, and depends on the seed, the block and the level alone. It
  is made when asked for; nothing is kept.

  Args:
    tau: int32 [B] noise levels.
    channels: number of channels.
    width: active ones.
    layer: number of the block; it may be traced.
    seed: of all masks.
  """
  key = jax.random.fold_in(jax.random.key(seed), layer)

  def ranks(level):
    return jax.random.permutation(jax.random.fold_in(key, level), channels)

  return jax.vmap(ranks)(tau) < width
