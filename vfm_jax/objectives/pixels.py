"""Read the videos of a batch as an encoder takes them."""

import jax
import jax.numpy as jnp

from vfm_jax.objectives.base import Batch

Channels = tuple[float, float, float]

# Per channel, of pixels in [0, 1].
IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)
IMAGENET_STD: Channels = (0.229, 0.224, 0.225)


def pixels(batch: Batch, *, channels: int = 3) -> jax.Array:
  """Return the video of a batch, f32 [B, T, H, W, C] in [0, 1].

  Args:
    batch: `video` uint8 [B, T, H, W, C], or float in [0, 1].
    channels: number of colours.

  Raises:
    ValueError: the video has another shape.
  """
  video = batch['video']
  if video.ndim != 5 or video.shape[-1] != channels:
    raise ValueError(
      f"expected batch['video'] [B, T, H, W, {channels}], found "
      f'{tuple(video.shape)}; change what `data` yields, or '
      '`objective.mean` and `objective.std`'
    )
  if jnp.issubdtype(video.dtype, jnp.floating):
    return video.astype(jnp.float32)
  return video.astype(jnp.float32) / 255.0


def normalise(video: jax.Array, mean: Channels, std: Channels) -> jax.Array:
  """Return (video - mean) / std, f32 [B, T, H, W, C]."""
  return (video - jnp.asarray(mean, jnp.float32)) / jnp.asarray(
    std, jnp.float32
  )
