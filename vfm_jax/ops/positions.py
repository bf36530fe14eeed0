"""Compute position tables as functions of the token id.

Fixed tables are computed on the host in float64 and cast to float32, so that
they are the same on every backend; any subset of tokens then gathers its rows.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from vfm_jax.ops import resize

Grid = tuple[int, int, int]
Kind = Literal['flat_sinusoid', 'sincos_3d', 'sincos_3d_split', 'sincos_2d']
ImageKind = Literal['first_slice', 'sincos_2d']
Resample = Literal['linear', 'bicubic', 'antialiased']


def flat_sinusoid(ids: np.ndarray, dim: int) -> np.ndarray:
  """Return the interleaved sinusoid of flat token ids, float64 [N, dim].

  angle(n, j) = n / 10000^(2 floor(j / 2) / dim); sine for even j, cosine for
  odd j. VideoMAE (Tong et al. 2022) uses it over the flat space-time index.
  """
  column = np.arange(dim)
  rate = np.power(10000.0, 2 * (column // 2) / dim)
  angle = np.asarray(ids, np.float64)[:, None] / rate
  return np.where(column % 2 == 0, np.sin(angle), np.cos(angle))


def sincos_1d(ids: np.ndarray, dim: int) -> np.ndarray:
  """Return [sin | cos] halves of the ids, float64 [N, dim].

  omega_i = 10000^(-i / (dim / 2)), i < dim / 2 (MAE, V-JEPA).
  """
  if dim % 2:
    raise ValueError(f'expected an even number of columns, found {dim}')
  omega = 10000.0 ** (-np.arange(dim // 2) / (dim / 2))
  angle = np.asarray(ids, np.float64).reshape(-1, 1) * omega
  return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def sincos_2d(
  grid: tuple[int, int], dim: int, *, first: Literal['h', 'w'] = 'h'
) -> np.ndarray:
  """Return 2-D sin-cos positions, float64 [H'*W', dim].

  Args:
    grid: (H', W').
    dim: width; a multiple of 4. Half of it codes each axis.
    first: the axis in the first half: 'h' as in V-JEPA, 'w' as in DiT.
  """
  if dim % 4:
    raise ValueError(f'expected a width that 4 divides, found {dim}')
  h, w = np.meshgrid(*map(np.arange, grid), indexing='ij')
  halves = [sincos_1d(h, dim // 2), sincos_1d(w, dim // 2)]
  return np.concatenate(halves if first == 'h' else halves[::-1], axis=1)


def sincos_3d(
  grid: Grid, dim: int, *, uniform_power: bool = True
) -> np.ndarray:
  """Return 3-D sin-cos positions, float64 [N, dim], as in V-JEPA.

  Args:
    grid: (T', H', W').
    dim: width. The columns are [t | h | w].
    uniform_power: give each axis ceil(dim / 6) * 2 columns and cut off what
      is too many; otherwise dim/2 columns for t and dim/4 for h and for w.
  """
  t, h, w = np.meshgrid(*map(np.arange, grid), indexing='ij')
  if uniform_power:
    dims = (-(-dim // 6) * 2,) * 3
  else:
    dims = (dim // 2, dim // 4, dim // 4)
  parts = [sincos_1d(x, d) for x, d in zip((t, h, w), dims, strict=True)]
  return np.concatenate(parts, axis=1)[:, :dim]


def time_features(t: jax.Array, dim: int) -> jax.Array:
  """Return the sinusoids of diffusion times, float32 [..., dim], cosines first.

  [cos(t f) | sin(t f)] with f_k = 10000^(-k / (dim // 2)); the last column of
  an odd `dim` is zero. ADM, DiT (arXiv:2212.09748).

  Args:
    t: [...] times, as they are: nothing scales them.
    dim: number of features.
  """
  half = dim // 2
  rate = 10000.0 ** (-np.arange(half) / half)
  angle = jnp.asarray(t, jnp.float32)[..., None] * rate.astype(np.float32)
  features = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)
  padding = [(0, 0)] * jnp.ndim(t) + [(0, dim % 2)]
  return jnp.pad(features, padding)


def interpolate(
  table: jax.Array,
  grid: Grid,
  new_grid: Grid,
  resample: Resample = 'linear',
) -> jax.Array:
  """Resample a position table to another grid.

  Sample points are cell centres. Time is interpolated linearly.

  Args:
    table: [T'*H'*W', D] on `grid`.
    grid: (T', H', W') of the table.
    new_grid: (T', H', W') that is wanted.
    resample: how space is interpolated: bilinearly, or 'bicubic' as in UMT's
      fine-tuned models, see `ops.resize.bicubic`. 'antialiased' is bilinear
      with a filter along axes that shrink (VideoPrism).
  """
  if tuple(grid) == tuple(new_grid):
    return table
  x = jnp.reshape(table, (*grid, -1))
  if resample == 'bicubic':
    x = resize.bicubic(x, *new_grid[1:])
  shape = (*new_grid, x.shape[-1])
  filtered = resample == 'antialiased'
  x = jax.image.resize(x, shape, 'trilinear', antialias=filtered)
  return x.reshape(-1, shape[-1])


def fixed_table(kind: Kind, dim: int, grid: Grid) -> np.ndarray:
  """Return the fixed position table of a grid, float32 [N, dim].

  'sincos_3d_split' gives time half of the columns, see `sincos_3d`.
  """
  t, h, w = grid
  if kind == 'flat_sinusoid':
    table = flat_sinusoid(np.arange(t * h * w), dim)
  elif kind in ('sincos_3d', 'sincos_3d_split'):
    table = sincos_3d(grid, dim, uniform_power=kind == 'sincos_3d')
  elif kind == 'sincos_2d':
    table = np.tile(sincos_2d((h, w), dim), (t, 1))
  else:
    raise ValueError(
      f'expected positions in {list(get_args(Kind))}, found {kind!r}'
    )
  return table.astype(np.float32)


def fit_table(
  table: jax.Array,
  built: Grid,
  grid: Grid,
  image: ImageKind = 'first_slice',
  resample: Resample = 'linear',
) -> jax.Array:
  """Fit a table to the grid of an input.

  Args:
    table: [N, D] on the grid `built`.
    built: (T', H', W') that the model was built for.
    grid: (T', H', W') of the input. T' = 1 (an image) is taken as the value
      `image` says, if `built` has more; other sizes are interpolated.
    image: 'first_slice' takes the rows of t = 0 (and interpolates them in
      space); 'sincos_2d' takes a separate 2-D sin-cos table.
    resample: see `interpolate`.

  Returns:
    [T'*H'*W', D] on the grid `grid`.
  """
  if grid[0] == 1 and built[0] > 1:
    if image == 'sincos_2d':
      return jnp.asarray(fixed_table('sincos_2d', table.shape[-1], grid))
    built = (1, *built[1:])
    table = table[: built[1] * built[2]]
  return interpolate(table, built, grid, resample)
