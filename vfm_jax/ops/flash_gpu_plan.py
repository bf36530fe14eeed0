"""Choose tiles for the Mosaic GPU kernels, and what each of them visits."""

import dataclasses

import jax
import jax.numpy as jnp

# Ids of padding: those of queries and of keys differ from each other, too.
PADDED_QUERY, PADDED_KEY = -1, -2
# Rows of a warpgroup: what one wgmma instruction computes.
ROWS = 64
# Warpgroups that compute; one more copies.
COMPUTE = 2
# Rows of a block of threads.
TILE = ROWS * COMPUTE


@dataclasses.dataclass(frozen=True)
class Plan:
  """Size one kernel.

  Attributes:
    step: rows that are streamed at a time: keys, or queries for dk and dv.
    stages: buffers that they go through.
    peel: mask the ragged end of the keys in a copy of the loop's body, not in
      the loop: faster, where the registers suffice.
    split: one warpgroup computes dk and the other dv of the same keys, where
      both do not fit into the registers of one.
    registers: of a thread that computes.
  """

  step: int
  stages: int = 2
  peel: bool = True
  split: bool = False
  registers: int = 232

  @property
  def tile(self) -> int:
    """Return the rows of a block of threads."""
    return ROWS if self.split else TILE


def forward(head_dim: int) -> Plan:
  """Return the plan of the forward kernel, for padded features of a head."""
  return Plan(128, peel=head_dim <= 96)


def backward_q() -> Plan:
  """Return the plan of the kernel of dq."""
  return Plan(64)


def backward_kv(head_dim: int, *, masked: bool) -> Plan:
  """Return the plan of the kernel of dk and dv.

  Args:
    head_dim: padded features of a head.
    masked: whether there are segments or a logit cap, which take registers.
  """
  return Plan(64, split=head_dim > (80 if masked else 96))


def padded(size: int, multiple: int) -> int:
  """Round up."""
  return -(-size // multiple) * multiple


def visited(
  here: jax.Array, there: jax.Array, tile: int, step: int
) -> jax.Array:
  """Return which steps each tile has to visit: [B, tiles, 2], first and end.

  A step is skipped if the segments that it holds cannot meet those of the
  tile. Packed clips follow each other, so one range a tile says it all; where
  they do not, masks make up for what the range holds too much.

  Args:
    here: segment ids int [B, tiles * tile]; negative ones are padding.
    there: segment ids int [B, steps * step].
    tile: tokens of a tile.
    step: tokens of a step.
  """
  low, high = _extent(here, tile)
  other_low, other_high = _extent(there, step)
  meet = (low[:, :, None] <= other_high[:, None]) & (
    other_low[:, None] <= high[:, :, None]
  )
  first = jnp.argmax(meet, axis=2)
  end = meet.shape[2] - jnp.argmax(meet[:, :, ::-1], axis=2)
  end = jnp.where(meet.any(axis=2), end, first)
  return jnp.stack([first, end], axis=-1).astype(jnp.int32)


def _extent(ids: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
  """Return the lowest and the highest id of each block of tokens."""
  ids = ids.reshape(ids.shape[0], -1, size)
  none = jnp.iinfo(jnp.int32).max
  return jnp.where(ids < 0, none, ids).min(2), ids.max(2)
