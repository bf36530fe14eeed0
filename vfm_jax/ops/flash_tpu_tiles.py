"""Share pieces of the TPU attention kernels."""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vfm_jax.ops.flash_tpu_plan import Plan

# Stands for minus infinity: differences of it are finite. Also the
# log-sum-exp of a row that may attend to nothing.
EMPTY = -1e30
LOG2_E = math.log2(math.e)
F32 = jnp.float32


def bend(raw, scale, logit_cap):
  """Return logits in units of log 2, and their slope if they are capped."""
  if logit_cap is None:
    return raw * (scale * LOG2_E), None
  bent = jnp.tanh(raw * (scale / logit_cap))
  return bent * (logit_cap * LOG2_E), 1.0 - bent * bent


def units(ref, size):
  """Return the heads and row slices of a block [1, heads, rows, D]."""
  return [
    (x, rows)
    for x in range(ref.shape[1])
    for rows in slices(ref.shape[2], size)
  ]


def dot(a, b, axes=(1, 0)):
  """Return the float32 product over an axis of a and one of b."""
  return jax.lax.dot_general(
    a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=F32
  )


def slices(stop, size, start=0):
  """Cut a range into slices of `size`; the last may be shorter."""
  return [slice(at, min(at + size, stop)) for at in range(start, stop, size)]


def live(down, across, block, chunk):
  """Tell which chunks have a common segment: int32 [B * blocks * chunks].

  Args:
    down: ids [B, R], in blocks of `block`.
    across: ids [B, C], in chunks of `chunk`.
    block: rows of a block.
    chunk: columns of a chunk.
  """
  # Padding repeats an id that is there.
  down, across = (
    jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % size)), 'edge').reshape(
      ids.shape[0], -1, size
    )
    for ids, size in ((down, block), (across, chunk))
  )
  same = down[:, :, None, :, None] == across[:, None, :, None, :]
  return same.any((-1, -2)).astype(jnp.int32).reshape(-1)


def compiler_params(plan: Plan):
  """Return what the grid (examples, heads, blocks) needs."""
  return pltpu.CompilerParams(
    dimension_semantics=('parallel', 'parallel', 'arbitrary'),
    vmem_limit_bytes=plan.vmem,
  )


def cost(q, k, *, products, tensors):
  """Describe the work to the compiler's scheduler."""
  pairs = q.size // q.shape[-1] * k.shape[2]
  return pl.CostEstimate(
    flops=2 * products * pairs * q.shape[-1],
    bytes_accessed=tensors * (q.size + k.size) * q.dtype.itemsize,
    transcendentals=pairs,
  )


def zero(u):
  """Return 0 in a way that the compiler can not see, another for each u.

  Two loads at the same known place are one to it, and a load of what was just
  stored is none: it keeps the value in a register all the time, has too few of
  them, and spills.
  """
  return jnp.minimum(pl.program_id(0) * (u + 1), 0)


def groups(rows, lanes, registers):
  """Cut rows of so many lanes into groups that fill registers."""
  # bfloat16 is stored by 16 rows.
  size = 16 * max(1, registers // (2 * -(-lanes // 128)))
  return slices(rows.stop, size, rows.start)
