"""Share what the Mosaic GPU kernels of attention do alike: copies and products.

Of the warpgroups of a block of threads the last one copies (TMA) what the
others compute on, through a ring of buffers: it fills a buffer as soon as all
have read it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from vfm_jax.ops.flash_gpu_plan import COMPUTE

AXIS = 'warpgroup'
GRID = ('tile', 'head', 'batch')
# Registers of a thread that copies; those of one that computes are planned.
COPIER_REGISTERS = 40

# To a checker, refs of a kernel have no type.
Ref = Any


def matrix(count: int, rows: int, dim: int) -> Any:
  """Return the type of `count` bf16 buffers [rows, dim] as wgmma reads them."""
  swizzle = plgpu.find_swizzle(16 * dim)
  transforms = (
    plgpu.TilingTransform((8, swizzle // 2)),
    plgpu.SwizzleTransform(swizzle),
  )
  return plgpu.SMEM((count, rows, dim), jnp.bfloat16, transforms=transforms)


def product(a: Any, b: Ref, columns: int) -> jax.Array:
  """Return a b, f32 [rows, columns]; a in registers or shared memory."""

  def run(acc):
    plgpu.wgmma(acc, a, b)
    return acc[...]

  return pl.run_scoped(run, accumulator(a.shape[0], columns))


def accumulator(rows: int, columns: int) -> Any:
  """Return the type of what wgmma adds to."""
  return plgpu.WGMMAAccumulatorRef((rows, columns), jnp.float32)


def add_product(acc: Any, a: jax.Array, b: Ref) -> Any:
  """Return acc + a b, with a in registers."""

  def run(ref):
    plgpu.wgmma(ref, a, b)

  return pl.run_state(run)(plgpu.WGMMAAccumulatorRef.init(acc))


def transposed(ref: Ref) -> Ref:
  """Return a view of a matrix in shared memory with its axes swapped."""
  return ref.transpose((1, 0))


def zeros(rows: int, dim: int) -> Any:
  """Return an accumulator of zeros."""
  return plgpu.layout_cast(
    jnp.zeros((rows, dim), jnp.float32), plgpu.Layout.WGMMA
  )


def vector(ref: Ref, queries: int = 0) -> Any:
  """Load what runs along one axis of a tile, see `flash_gpu_tiles`.

  Args:
    ref: [queries] or [keys] in shared memory.
    queries: axis of the tile that it runs along.
  """
  load: Any = plgpu.load  # checkers know older versions
  return load(ref, layout=plgpu.Layout.WGMMA.reduce(1 - queries))


def copy_ahead(
  copy: Callable[[Any, Any], None],
  first: Any,
  end: Any,
  stages: int,
  read: list[Ref],
) -> None:
  """Copy steps first to end, as far ahead as there are buffers.

  Args:
    copy: (step, slot) starts the copies of a step into its buffers.
    first: first step.
    end: step after the last.
    stages: number of buffers.
    read: barriers that say that a slot has been read.
  """
  for slot in range(stages):

    @pl.when(first + slot < end)
    def _fill(slot=slot):
      copy(first + slot, slot)

  @pl.loop(first + stages, end)
  def _refill(step):
    slot = lax.rem(step - first, jnp.int32(stages))
    for barrier in read:
      plgpu.barrier_wait(barrier.at[slot])
    copy(step, slot)


def role(compute: Callable[[Any], None], copy: Callable[[], None], registers):
  """Run `compute(warpgroup)` on those that compute, `copy()` on the last."""
  warpgroup = lax.axis_index(AXIS)

  @pl.when(warpgroup < COMPUTE)
  def _compute():
    plgpu.set_max_registers(registers, action='increase')
    compute(warpgroup)

  @pl.when(warpgroup == COMPUTE)
  def _copy():
    plgpu.set_max_registers(COPIER_REGISTERS, action='decrease')
    copy()
