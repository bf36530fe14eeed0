"""Draw space-time blocks to predict, and what is left to predict them from.

The multi-block masks of V-JEPA (arXiv:2404.08471, section 3.2) and V-JEPA 2. A
splitter is a function (keys [B], grid (T', H', W')) -> Split, whose two lengths
are the same for every key.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vfm_jax.ops import masking
from vfm_jax.ops import tokens as tok

Grid = tok.Grid
Range = tuple[float, float]
Array = Any  # of NumPy, or of JAX


class Split(NamedTuple):
  """Say which tokens are seen and which are predicted.

  Attributes:
    visible_idx: int32 [B, n] tokens that the encoder sees, ascending.
    target_idx: int32 [B, m] tokens to predict, ascending, none of those.
  """

  visible_idx: jax.Array
  target_idx: jax.Array


def complement(keys: jax.Array, grid: Grid, *, mask: masking.Sampler) -> Split:
  """Predict exactly what a sampler of `ops.masking` hides."""
  hidden = masking.num_hidden(mask, grid, path='objective.masks')
  return Split(*tok.split_by_mask(mask(keys, grid), hidden))


@dataclasses.dataclass(frozen=True)
class MultiBlock:
  """Hide several blocks of one size and predict them from the rest.

  The released code cuts the lists of a batch to its shortest one; these are
  cut to lengths that never change, which compiles once and needs no padding.
  Where blocks leave fewer tokens than `context`, tokens of the blocks are
  shown, and where they cover fewer than `targets`, tokens that the encoder does
  not see are predicted as well: both rare for lengths well chosen, and ours.
  Each example draws a block size of its own, where the released code draws one
  for all the examples of a step.

  Attributes:
    num_blocks: number of blocks; they may overlap.
    spatial_scale: range of a block's share of a time slice.
    temporal_scale: range of its share of the slices.
    aspect: range of its height over its width.
    context: fraction of all tokens that the encoder sees; None for all that
      are no targets.
    targets: fraction of all tokens to predict; None for all that the encoder
      does not see (`full_complement` in V-JEPA 2).
    inverse: show the blocks and predict the rest (`inv_block`).
    last_slice: share of the time slices, from the first, that may be seen.
    drop: which tokens go where there are too many: any, at 'random', or the
      'last' of the raster, thus of the latest slices, as the released code has
      it.
  """

  num_blocks: int = 8
  spatial_scale: Range = (0.15, 0.15)
  temporal_scale: Range = (1.0, 1.0)
  aspect: Range = (0.75, 1.5)
  context: float | None = 0.25
  targets: float | None = 0.5
  inverse: bool = False
  last_slice: float = 1.0
  drop: Literal['random', 'last'] = 'random'

  def __post_init__(self):
    """Refuse ranges that no block fits in, and lengths that leave nothing."""
    for name in ('spatial_scale', 'temporal_scale', 'aspect'):
      low, high = getattr(self, name)
      if not 0 < low <= high or (name != 'aspect' and high > 1):
        raise ValueError(
          f'`objective.masks`: expected `{name}` (low, high) with 0 < low <= '
          f'high{"" if name == "aspect" else " <= 1"}, found {(low, high)}'
        )
    if self.context is None and self.targets is None:
      raise ValueError(
        '`objective.masks`: give `context`, `targets` or both, found None '
        'for both'
      )

  def lengths(self, grid: Grid) -> tuple[int, int]:
    """Return how many tokens are seen and how many are predicted.

    Raises:
      ValueError: there are none of either, or more than there are tokens.
    """
    n = math.prod(grid)
    seen = None if self.context is None else int(self.context * n)
    wanted = None if self.targets is None else int(self.targets * n)
    seen = n - (wanted or 0) if seen is None else seen
    wanted = n - seen if wanted is None else wanted
    if seen < 1 or wanted < 1 or seen + wanted > n:
      raise ValueError(
        f'`objective.masks`: expected at least 1 token to see, 1 to predict '
        f'and no more than the {n} of grid {grid} together, found {seen} and '
        f'{wanted}; change `context` or `targets`'
      )
    return seen, wanted

  def __call__(self, keys: jax.Array, grid: Grid) -> Split:
    """Draw a split of each example.

    Args:
      keys: one key an example, [B].
      grid: (T', H', W').
    """
    seen, wanted = self.lengths(grid)
    n = math.prod(grid)
    draws = jax.vmap(lambda k: jax.random.split(k, 3))(keys)
    hidden = jax.vmap(lambda a, b: self._hidden(a, b, grid))(
      draws[:, 0], draws[:, 1]
    )
    if self.drop == 'random':
      rank = jax.vmap(lambda k: jax.random.uniform(k, (n,)))(draws[:, 2])
    else:
      rank = jnp.broadcast_to(jnp.arange(n) / n, hidden.shape)
    if self.inverse:
      hidden = ~hidden
    if self.context is None:
      target = _first(~hidden + rank, wanted)
      return Split(_first(_among(target, n) + rank, seen), target)
    visible = _first(hidden + rank, seen)
    # What the encoder sees comes last, what is in no block before it.
    order = 4 * _among(visible, n) + 2 * ~hidden + rank
    return Split(visible, _first(order, wanted))

  def _hidden(self, size_key, place_key, grid) -> jax.Array:
    """Return which tokens of an example are in blocks, bool [N]."""
    size = block_size(
      jax.random.uniform(size_key, (3,)),
      grid,
      spatial_scale=self.spatial_scale,
      temporal_scale=self.temporal_scale,
      aspect=self.aspect,
    )
    draw = jax.random.uniform(place_key, (self.num_blocks, 3))
    corner = jnp.floor(draw * (jnp.asarray(grid) - size + 1)).astype(jnp.int32)
    return in_blocks(size, corner, grid, last_slice=self.last_slice)


def block_size(
  draws: Array,
  grid: Grid,
  *,
  spatial_scale: Range,
  temporal_scale: Range,
  aspect: Range,
) -> Array:
  """Return the size (t, h, w) of a block, int32 [..., 3].

  h = round(sqrt(a r)) and w = round(sqrt(a / r)) for an area a and a ratio r,
  halves to even, clipped to the grid.

  Args:
    draws: [..., 3] in [0, 1): for the share of the slices, the share of a
      slice, and the aspect ratio. NumPy arrays give float64 arithmetic.
    grid: (T', H', W').
    spatial_scale: see `MultiBlock`.
    temporal_scale: see `MultiBlock`.
    aspect: see `MultiBlock`.
  """
  xp: Any = jnp if isinstance(draws, jax.Array) else np
  ranges = (temporal_scale, spatial_scale, aspect)
  time, space, ratio = (
    low + draws[..., i] * (high - low) for i, (low, high) in enumerate(ranges)
  )
  t, h, w = grid
  area = xp.floor(h * w * space)
  size = (
    xp.floor(t * time),
    xp.minimum(h, xp.round(xp.sqrt(area * ratio))),
    xp.minimum(w, xp.round(xp.sqrt(area / ratio))),
  )
  return xp.maximum(xp.stack(size, -1), 1).astype(xp.int32)


def in_blocks(
  size: Array, corner: Array, grid: Grid, *, last_slice: float = 1.0
) -> Array:
  """Return which tokens are in any of the blocks, bool [N].

  Args:
    size: int [3], of every block.
    corner: int [P, 3], the first (t, h, w) of each.
    grid: (T', H', W').
    last_slice: later slices than this share of them count as in a block.
  """
  place = np.stack(np.unravel_index(np.arange(math.prod(grid)), grid), -1)
  corner = corner[:, None]
  inside = (place >= corner) & (place < corner + size)
  late = place[:, 0] >= max(1, int(grid[0] * last_slice))
  return inside.all(-1).any(0) | late


def cut_to_shortest(
  hidden: np.ndarray,
  *,
  rest: Literal['none', 'targets', 'context'] = 'none',
  inverse: bool = False,
  max_context: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Split a batch as the released data loaders do, on the host.

  Both lists of an example are cut to the shortest of the batch and lose their
  largest indices, thus the latest slices: lengths differ from batch to batch.

  Args:
    hidden: bool [B, N].
    rest: make the 'targets' all that is not seen once that is cut
      (`full_complement`), or the 'context' all that is not predicted
      (`pred_full_complement`).
    inverse: exchange the two.
    max_context: most tokens to see.

  Returns:
    int32 [B, n] tokens that the encoder sees, and int32 [B, m] to predict.
  """
  lists = [[np.flatnonzero(x) for x in m] for m in (~hidden, hidden)]
  shortest = [min(map(len, group)) for group in lists]
  if max_context is not None:
    shortest[0] = min(shortest[0], max_context)
  seen, wanted = (
    np.stack([x[:k] for x in group]).astype(np.int32)
    for group, k in zip(lists, shortest, strict=True)
  )
  every = np.arange(hidden.shape[1], dtype=np.int32)
  if rest == 'targets':
    wanted = np.stack([np.setdiff1d(every, x) for x in seen])
  elif rest == 'context':
    seen = np.stack([np.setdiff1d(every, x) for x in wanted])
  return (wanted, seen) if inverse else (seen, wanted)


def _first(order: jax.Array, count: int) -> jax.Array:
  """Return the `count` tokens of the smallest order, int32, ascending."""
  chosen = jnp.argsort(order, axis=1)[:, :count]
  return jnp.sort(chosen, axis=1).astype(jnp.int32)


def _among(idx: jax.Array, n: int) -> jax.Array:
  """Return f32 [B, N], 1 at the indices [B, n]."""
  rows = jnp.arange(len(idx))[:, None]
  return jnp.zeros((len(idx), n)).at[rows, idx].set(1.0)


# The two masks of every clip in V-JEPA. The lengths are ours: one example in
# twenty has fewer tokens in its blocks, or beside them.
SHORT = MultiBlock()
LONG = MultiBlock(
  num_blocks=2, spatial_scale=(0.7, 0.7), context=0.07, targets=0.7
)
