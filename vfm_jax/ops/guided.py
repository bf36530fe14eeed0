"""Hide what a teacher does not attend to.

UMT (arXiv:2303.16058) draws the visible tokens without replacement, with
probabilities in proportion to a teacher's attention. That is what sorting by
log(attention) plus Gumbel noise does (arXiv:1903.06059).
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from vfm_jax.ops import blocks, masking
from vfm_jax.ops import tokens as tok

Grid = tuple[int, int, int]

# Added to the attention, so that a weight that underflows is least, not NaN.
_TINY = 1e-30


@runtime_checkable
class Guided(Protocol):
  """A sampler of masks, see `ops.masking`, that attention guides."""

  def __call__(self, keys: jax.Array, grid: Grid) -> jax.Array:
    """Return the mask of even attention; see `guided`."""
    ...

  def guided(
    self, keys: jax.Array, grid: Grid, attention: jax.Array
  ) -> jax.Array:
    """Return bool [B, N], True = hidden, as many in each row.

    Args:
      keys: one key an example, [B].
      grid: (T', H', W').
      attention: f32 [B, N], not negative.
    """
    ...


@dataclasses.dataclass(frozen=True)
class AttentionGuided:
  """Hide floor(ratio * H'W') cells in each time slice, others in each.

  Attributes:
    ratio: fraction of the cells to hide.
  """

  ratio: float = 0.8

  def __call__(self, keys: jax.Array, grid: Grid) -> jax.Array:
    """Return the mask of even attention; see `guided`."""
    n = grid[0] * grid[1] * grid[2]
    return self.guided(keys, grid, jnp.ones((keys.shape[0], n)))

  def guided(
    self, keys: jax.Array, grid: Grid, attention: jax.Array
  ) -> jax.Array:
    """Return the mask; see `Guided`."""
    noise = jax.vmap(lambda key: jax.random.gumbel(key, attention.shape[1:]))
    score = jnp.log(attention + _TINY) + noise(keys)
    slices = score.reshape(-1, grid[1] * grid[2])
    return from_order(jnp.argsort(-slices, axis=1), grid, ratio=self.ratio)


def from_order(order: jax.Array, grid: Grid, *, ratio: float) -> jax.Array:
  """Return the mask of cells in the order in which they were drawn.

  Args:
    order: int [B * T', H'W'], a permutation of the cells of each slice: the
      first H'W' - floor(ratio * H'W') stay visible.
    grid: (T', H', W').
    ratio: fraction of the cells to hide.

  Returns:
    bool [B, N], True = hidden.
  """
  cells = grid[1] * grid[2]
  if not 0 <= ratio <= 1:
    raise ValueError(
      f'expected a mask ratio from 0 to 1, found {ratio}; change '
      '`objective.mask.ratio`'
    )
  visible = cells - int(ratio * cells)
  rank = jnp.argsort(jnp.asarray(order), axis=1)
  return (rank >= visible).reshape(-1, grid[0] * cells)


def split(
  sampler: Any,
  keys: jax.Array,
  grid: Grid,
  attention: jax.Array | None,
  *,
  path: str = 'objective.mask',
) -> blocks.Split:
  """Return what any sampler shows and hides.

  Args:
    sampler: `Guided`, a splitter of `ops.blocks`, or a sampler of
      `ops.masking`, which then hides what it says and predicts all of it.
    keys: one key an example, [B].
    grid: (T', H', W').
    attention: f32 [B, N], or None for a teacher that has none.
    path: config path of the sampler, for messages.

  Raises:
    ValueError: the sampler needs attention and there is none, or it hides
      all tokens or none.
  """
  if isinstance(sampler, Guided):
    if attention is None:
      raise ValueError(
        f'`{path}` {type(sampler).__name__} is guided by the attention of '
        '`objective.teacher`, which gives none; take masking.tube or another '
        'teacher'
      )
    drawn = sampler.guided(keys, grid, attention)
  else:
    drawn = sampler(keys, grid)
  if isinstance(drawn, blocks.Split):
    return drawn
  hidden = masking.num_hidden(sampler, grid, path=path)
  return blocks.Split(*tok.split_by_mask(drawn, hidden))
