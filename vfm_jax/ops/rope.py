"""Rotate queries and keys by the position of their token in space and time.

RoPE (arXiv:2104.09864) with three axes, as V-JEPA 2 (arXiv:2506.09985) has it:
of a head's D features, 2 * floor(floor(D / 3) / 2) turn with the time of the
token, as many with its row and with its column; the rest stay.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vfm_jax.ops import tokens as tok

Grid = tok.Grid
# 'paired' turns each pair of neighbouring features by one angle. 'tiled' is
# what V-JEPA 2 was trained with: the list of angles is laid out twice in a row,
# so that the two features of a pair take different ones, and lengths change.
Layout = Literal['paired', 'tiled']


class Rotation(NamedTuple):
  """Hold factors of tokens, f32 [N, D] or [B, N, D].

  Attributes:
    cos: factor of each feature.
    sin: factor of the other feature of its pair.
  """

  cos: jax.Array
  sin: jax.Array


def coordinates(grid: Grid) -> np.ndarray:
  """Return (t, h, w) of all tokens in raster order, float32 [N, 3]."""
  axes = np.meshgrid(*map(np.arange, grid), indexing='ij')
  return np.stack(axes, -1).reshape(-1, 3).astype(np.float32)


def axis_angles(
  position: jax.Array, dim: int, layout: Layout = 'paired'
) -> jax.Array:
  """Return the angles along one axis, f32 [..., dim].

  omega_k = 10000^(-k / (dim / 2)), k < dim / 2.

  Args:
    position: [...] coordinates along the axis; they need not be whole.
    dim: features that turn with it, an even number.
    layout: see `Layout`.
  """
  omega = 10000.0 ** (-np.arange(dim // 2) / max(dim // 2, 1))
  position = jnp.asarray(position, jnp.float32)
  angle = position[..., None] * omega.astype(np.float32)
  if layout == 'tiled':
    return jnp.concatenate([angle, angle], -1)
  return jnp.repeat(angle, 2, axis=-1)


def rotation(
  position: jax.Array, head_dim: int, layout: Layout = 'paired'
) -> Rotation:
  """Return the rotation of tokens: [time | row | column | nothing].

  Args:
    position: [..., N, 3] coordinates (t, h, w).
    head_dim: features of a head, at least 6.
    layout: see `Layout`.

  Raises:
    ValueError: a head is too narrow for three axes.
  """
  dim = 2 * (head_dim // 3 // 2)
  if not dim:
    raise ValueError(
      'expected heads of at least 6 features for positions in three axes, '
      f'found {head_dim}; change `width` or `heads`'
    )
  position = jnp.asarray(position, jnp.float32)
  angles = [axis_angles(position[..., i], dim, layout) for i in range(3)]
  rest = jnp.zeros((*position.shape[:-1], head_dim - 3 * dim))
  angle = jnp.concatenate([*angles, rest], -1)
  return Rotation(jnp.cos(angle), jnp.sin(angle))


def of_tokens(
  grid: Grid,
  idx: jax.Array | None,
  head_dim: int,
  layout: Layout = 'paired',
) -> Rotation:
  """Return the rotation of tokens of a grid, at their whole coordinates.

  Args:
    grid: (T', H', W').
    idx: int32 [B, n] token numbers; None for all.
    head_dim: features of a head.
    layout: see `Layout`.
  """
  position = jnp.asarray(coordinates(grid))
  if idx is not None:
    position = tok.take(position, idx)
  return rotation(position, head_dim, layout)


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
  """Return x * cos + swap(x) * sin, where swap(x0, x1) = (-x1, x0).

  Args:
    x: [B, N, H, D] queries or keys.
    by: of the same tokens, [N, D] or [B, N, D].
  """
  cos, sin = (f[..., None, :] for f in by)
  wide = x.astype(jnp.float32)
  swapped = jnp.stack([-wide[..., 1::2], wide[..., ::2]], -1)
  return (wide * cos + swapped.reshape(x.shape) * sin).astype(x.dtype)
