"""Draw which tokens are hidden, one key an example.

A sampler is a function (keys [B], grid (T', H', W')) -> bool [B, N], True =
hidden, whose number of hidden tokens is the same for every key. What is
deterministic about a mask is a function of its own, apart from the draw.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Grid = tuple[int, int, int]
Sampler = Callable[[jax.Array, Grid], jax.Array]


def tube(keys: jax.Array, grid: Grid, *, ratio: float = 0.9) -> jax.Array:
  """Hide the same cells in every time slice (VideoMAE).

  floor(ratio * H'W') cells are hidden in each slice; with T' = 1 it is the
  mask of an image.

  Args:
    keys: one key an example, [B].
    grid: (T', H', W').
    ratio: fraction of the cells to hide.
  """
  cells = grid[1] * grid[2]
  order = jax.vmap(lambda k: jax.random.permutation(k, cells))(keys)
  return tube_from_order(order, grid, ratio=ratio)


def tube_from_order(order: jax.Array, grid: Grid, *, ratio: float) -> jax.Array:
  """Return the tube mask of shuffled cell numbers.

  Args:
    order: int [B, H'W'], a permutation of 0..H'W'-1 in each row. The cells
      that hold the largest numbers are hidden.
    grid: (T', H', W').
    ratio: fraction of the cells to hide.
  """
  cells = grid[1] * grid[2]
  hidden = order >= cells - _num_hidden(cells, ratio)
  return jnp.tile(hidden, (1, grid[0]))


def random(keys: jax.Array, grid: Grid, *, ratio: float = 0.9) -> jax.Array:
  """Hide floor(ratio * N) tokens anywhere in space and time (as in MAE)."""
  n = grid[0] * grid[1] * grid[2]
  order = jax.vmap(lambda k: jax.random.permutation(k, n))(keys)
  return random_from_order(order, grid, ratio=ratio)


def random_from_order(
  order: jax.Array, grid: Grid, *, ratio: float
) -> jax.Array:
  """Return the random mask of shuffled token numbers, int [B, N]."""
  n = grid[0] * grid[1] * grid[2]
  return order >= n - _num_hidden(n, ratio)


def future(keys: jax.Array, grid: Grid, *, ratio: float = 0.5) -> jax.Array:
  """Hide the last floor(ratio * T') time slices of every example.

  What is hidden can only be extrapolated, which takes the motion of what is
  visible; `tube` and `random` can be filled in from both sides of time.
  """
  slices = jnp.arange(grid[0]).repeat(grid[1] * grid[2])
  hidden = slices >= grid[0] - _num_hidden(grid[0], ratio)
  return jnp.broadcast_to(hidden, (keys.shape[0], hidden.size))


def either(
  keys: jax.Array,
  grid: Grid,
  *,
  first: Sampler,
  second: Sampler,
  probability: float = 0.5,
) -> jax.Array:
  """Draw for each example the mask of one of two samplers.

  Args:
    keys: one key an example, [B].
    grid: (T', H', W').
    first: sampler that is used with `probability`.
    second: sampler that is used otherwise.
    probability: of the first, in [0, 1].

  Raises:
    ValueError: the two hide different numbers of tokens.
  """
  counts = [
    num_hidden(s, grid, path=f'objective.mask.{name}')
    for s, name in ((first, 'first'), (second, 'second'))
  ]
  if counts[0] != counts[1]:
    raise ValueError(
      '`objective.mask`: the two samplers must hide equally many tokens, '
      f'found {counts[0]} by `first` and {counts[1]} by `second` on the grid '
      f'{grid}; change one of their ratios'
    )
  draw = jax.vmap(jax.random.split)(keys)
  choice = jax.vmap(lambda k: jax.random.bernoulli(k, probability))(draw[:, 0])
  masks = first(draw[:, 1], grid), second(draw[:, 1], grid)
  return jnp.where(choice[:, None], *masks)


def running_cell(
  keys: jax.Array, grid: Grid, *, ratio: float = 0.5
) -> jax.Array:
  """Hide a pattern of 2x2 cells that moves on with time (VideoMAE V2).

  The mask of the decoder: True = not decoded. Each example draws one of the
  four phases of `running_cell_patterns`.
  """
  patterns = jnp.asarray(running_cell_patterns(grid, ratio=ratio))
  phase = jax.vmap(lambda k: jax.random.randint(k, (), 0, 4))(keys)
  return patterns[phase]


def running_cell_patterns(grid: Grid, *, ratio: float) -> np.ndarray:
  """Return the four running-cell masks, bool [4, N].

  A queue of four flags has its first floor(4 * ratio) set. With phase p, the
  cell position i (row-major in the 2x2 cell) of time slice t is hidden if
  queue[(i + p + t + 1) mod 4] is: the pointer moves before the first slice.

  Raises:
    ValueError: H' or W' is odd, so 2x2 cells do not tile the grid.
  """
  t, h, w = grid
  if h % 2 or w % 2:
    raise ValueError(
      f'running_cell needs an even token grid, found {h}x{w}; change the '
      'crop size in `data` or `objective.encoder.patch`, or set '
      '`objective.decoder_mask` to None'
    )
  queue = np.arange(4) < int(4 * ratio)
  phase, time, row, column = np.ix_(
    np.arange(4), np.arange(t), np.arange(h), np.arange(w)
  )
  position = 2 * (row % 2) + column % 2
  return queue[(position + phase + time + 1) % 4].reshape(4, -1)


def num_hidden(sampler: Sampler, grid: Grid, *, path: str) -> int:
  """Return how many tokens a sampler hides, as a static number.

  One mask is drawn while the caller is traced: the number is the same for
  every key by the contract of a sampler.

  Raises:
    ValueError: all tokens or none are hidden, or the mask has another size.
  """
  n = grid[0] * grid[1] * grid[2]
  with jax.ensure_compile_time_eval():
    mask = np.asarray(sampler(jax.random.split(jax.random.key(0), 1), grid))
  if mask.ndim != 2 or mask.shape[1] != n or mask.dtype != np.bool_:
    raise ValueError(
      f'`{path}` must give bool [B, {n}] for the token grid {grid}, found '
      f'{mask.dtype} {mask.shape}'
    )
  hidden = int(mask[0].sum())
  if not 0 < hidden < n:
    raise ValueError(
      f'`{path}` must hide at least 1 and leave at least 1 of the {n} tokens '
      f'of grid {grid}, found {hidden} hidden; change `{path}.ratio`'
    )
  return hidden


def _num_hidden(n: int, ratio: float) -> int:
  if not 0 <= ratio <= 1:
    raise ValueError(
      f'expected a mask ratio from 0 to 1, found {ratio}; change '
      '`objective.mask.ratio`'
    )
  return int(ratio * n)
