"""Resize images and maps as published networks expect it."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Grid = Literal['corner', 'center']


def bilinear(x: jax.Array, size: int, grid: Grid = 'center') -> jax.Array:
  """Interpolate to a square, without a filter against aliasing.

  Args:
    x: f32 [B, H, W, C].
    size: height and width of the result.
    grid: where pixel i of n lies: `center` at (i + 1/2) / n, as in torch and
      TensorFlow 2; `corner` at i / n, as in TensorFlow 1 by default.

  Returns:
    f32 [B, size, size, C].
  """
  rows = _weights(x.shape[1], size, grid)
  columns = _weights(x.shape[2], size, grid)
  return jax.numpy.einsum(
    'ih,bhwc,jw->bijc', rows, x, columns, precision=jax.lax.Precision.HIGHEST
  )


def bicubic(x: jax.Array, height: int, width: int) -> jax.Array:
  """Interpolate with Keys' cubic, a = -3/4, as torch does.

  Pixel i of n lies at (i + 1/2) / n, the border is repeated, and nothing
  filters against aliasing; `jax.image.resize` takes a = -1/2.

  Args:
    x: [B, H, W, C].
    height: rows of the result.
    width: columns of the result.

  Returns:
    f32 [B, height, width, C].
  """
  x = x.astype(jnp.float32)
  if x.shape[1:3] == (height, width):
    return x
  rows = _cubic_weights(x.shape[1], height)
  columns = _cubic_weights(x.shape[2], width)
  return jax.numpy.einsum(
    'ih,bhwc,jw->bijc', rows, x, columns, precision=jax.lax.Precision.HIGHEST
  )


def repeat(x: jax.Array, factor: int) -> jax.Array:
  """Repeat rows and columns: [B, H, W, C] to [B, factor H, factor W, C]."""
  return jnp.repeat(jnp.repeat(x, factor, axis=1), factor, axis=2)


def _weights(old: int, new: int, grid: Grid) -> np.ndarray:
  """Return the weight of each old pixel in each new one, f32 [new, old]."""
  place = np.arange(new, dtype=np.float32) * np.float32(old / new)
  if grid == 'center':
    half = np.float32(0.5)
    place = (np.arange(new, dtype=np.float32) + half) * np.float32(old / new)
    place = np.maximum(place - half, 0)
  low = np.floor(place).astype(np.int32)
  fraction = place - low
  out = np.zeros((new, old), np.float32)
  np.add.at(out, (np.arange(new), low), 1 - fraction)
  np.add.at(out, (np.arange(new), np.minimum(low + 1, old - 1)), fraction)
  return out


def _cubic_weights(old: int, new: int) -> np.ndarray:
  """Return the weight of each old pixel in each new one, f32 [new, old]."""
  a = -0.75
  place = (np.arange(new) + 0.5) * (old / new) - 0.5
  low = np.floor(place).astype(np.int64)
  out = np.zeros((new, old))
  for offset in range(-1, 3):
    d = np.abs(place - (low + offset))
    near = ((a + 2) * d - (a + 3)) * d**2 + 1
    far = a * (((d - 5) * d + 8) * d - 4)
    column = np.clip(low + offset, 0, old - 1)
    np.add.at(out, (np.arange(new), column), np.where(d <= 1, near, far))
  return out.astype(np.float32)
