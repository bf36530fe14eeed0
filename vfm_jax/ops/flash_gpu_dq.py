"""Compute dq on Hopper, in Pallas Mosaic GPU.

A block of threads holds 128 queries of one head and streams keys and values,
computing the weights again from the log-sum-exp (FlashAttention-2, algorithm
2). The other gradients are those of `flash_gpu_dkv`: two kernels, and none of
them adds into memory.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from vfm_jax.ops import flash_gpu_plan as plan_lib
from vfm_jax.ops import flash_gpu_stream as stream
from vfm_jax.ops import flash_gpu_tiles as tiles
from vfm_jax.ops.flash_gpu_plan import COMPUTE, ROWS, TILE, Plan


def backward_q(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  do: jax.Array,
  lse: jax.Array,
  delta: jax.Array,
  segments: tuple[jax.Array, jax.Array, jax.Array] | None,
  *,
  keys: int,
  scale: float,
  logit_cap: float | None,
) -> jax.Array:
  """Return dq, bf16 [B, N, H, D].

  Args:
    q: see `flash_gpu_forward.forward`.
    k: see there.
    v: see there.
    do: gradient of the output, bf16 [B, N, H, D].
    lse: log-sum-exp in base 2, f32 [B, H, N up to a tile].
    delta: sum of do * out over the features, like lse.
    segments: see there, with the steps of this kernel.
    keys: see there.
    scale: see there.
    logit_cap: see there.
  """
  batch, n, heads, dim = q.shape
  packed = segments is not None
  plan = plan_lib.backward_q()
  barrier = functools.partial(plgpu.Barrier, num_barriers=plan.stages)
  scratch = dict(
    q_smem=stream.matrix(COMPUTE, ROWS, dim),
    do_smem=stream.matrix(COMPUTE, ROWS, dim),
    k_smem=stream.matrix(plan.stages, plan.step, dim),
    v_smem=stream.matrix(plan.stages, plan.step, dim),
    lse_smem=plgpu.SMEM((COMPUTE, ROWS), jnp.float32),
    delta_smem=plgpu.SMEM((COMPUTE, ROWS), jnp.float32),
    own_ready=plgpu.Barrier(num_barriers=COMPUTE, num_arrivals=4 + packed),
    k_ready=barrier(num_arrivals=1 + packed),
    v_ready=barrier(num_arrivals=1),
    read=barrier(num_arrivals=COMPUTE),
  )
  if packed:
    scratch |= dict(
      q_ids_smem=plgpu.SMEM((COMPUTE, ROWS), jnp.int32),
      k_ids_smem=plgpu.SMEM((plan.stages, plan.step), jnp.int32),
    )
  body = functools.partial(
    _q_packed if packed else _q_body,
    plan=plan,
    groups=heads // k.shape[2],
    keys=keys,
    scale=scale,
    logit_cap=logit_cap,
  )
  return plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
    scratch_types=scratch,
    grid=(pl.cdiv(n, TILE), heads, batch),
    grid_names=stream.GRID,
    num_threads=COMPUTE + 1,
    thread_name=stream.AXIS,
    compiler_params=plgpu.CompilerParams(approx_math=True),
    kernel_name='vfm_attention_dq',
  )(q, k, v, do, lse, delta, *(segments or ()))


def _q_packed(
  q, k, v, do, lse, delta, q_ids, k_ids, ranges, dq, **rest
):  # fmt: skip
  ids = q_ids, k_ids, ranges
  _q_body(q, k, v, do, lse, delta, dq, segments=ids, **rest)


def _q_body(
  q_ref: Any,
  k_ref: Any,
  v_ref: Any,
  do_ref: Any,
  lse_ref: Any,
  delta_ref: Any,
  dq_ref: Any,
  *,
  plan: Plan,
  groups: int,
  keys: int,
  scale: float,
  logit_cap: float | None,
  q_smem: Any,
  do_smem: Any,
  k_smem: Any,
  v_smem: Any,
  lse_smem: Any,
  delta_smem: Any,
  own_ready: Any,
  k_ready: Any,
  v_ready: Any,
  read: Any,
  segments: tuple[Any, Any, Any] | None = None,
  q_ids_smem: Any = None,
  k_ids_smem: Any = None,
):
  tile, head, batch = (lax.axis_index(a) for a in stream.GRID)
  kv_head = lax.div(head, jnp.int32(groups))
  shape = (ROWS, plan.step)
  if segments is None:
    first, end = jnp.int32(0), jnp.int32(pl.cdiv(keys, plan.step))
  else:
    first, end = segments[2][batch, tile, 0], segments[2][batch, tile, 1]

  def copy(step, slot):
    rows = pl.ds(step * plan.step, plan.step)
    if segments is not None:
      plgpu.copy_gmem_to_smem(
        segments[1].at[batch, rows], k_ids_smem.at[slot], k_ready.at[slot]
      )
    for ref, smem, ready in (
      (k_ref, k_smem, k_ready),
      (v_ref, v_smem, v_ready),
    ):
      plgpu.copy_gmem_to_smem(
        ref.at[batch, rows, kv_head], smem.at[slot], ready.at[slot]
      )

  def compute(warpgroup):
    rows = pl.ds(tile * TILE + warpgroup * ROWS, ROWS)
    ready = own_ready.at[warpgroup]
    q_own, do_own = q_smem.at[warpgroup], do_smem.at[warpgroup]
    plgpu.copy_gmem_to_smem(q_ref.at[batch, rows, head], q_own, ready)
    plgpu.copy_gmem_to_smem(do_ref.at[batch, rows, head], do_own, ready)
    for ref, smem in ((lse_ref, lse_smem), (delta_ref, delta_smem)):
      plgpu.copy_gmem_to_smem(
        ref.at[batch, head, rows], smem.at[warpgroup], ready
      )
    if segments is not None:
      plgpu.copy_gmem_to_smem(
        segments[0].at[batch, rows], q_ids_smem.at[warpgroup], ready
      )
    plgpu.barrier_wait(ready)
    lse = stream.vector(lse_smem.at[warpgroup])
    delta = stream.vector(delta_smem.at[warpgroup])
    q_ids: Any = (
      None if segments is None else stream.vector(q_ids_smem.at[warpgroup])
    )

    def visit(step, dq, mask_end=False):
      slot = lax.rem(step - first, jnp.int32(plan.stages))
      k_slot, v_slot = k_smem.at[slot], v_smem.at[slot]
      plgpu.barrier_wait(k_ready.at[slot])
      x = stream.product(q_own, stream.transposed(k_slot), plan.step)
      x = tiles.logits(x, scale=scale, logit_cap=logit_cap)
      if segments is not None:
        k_ids = stream.vector(k_ids_smem.at[slot], queries=1)
        allowed = tiles.same_segment(q_ids, k_ids, shape)
        x = tiles.forbid(x, allowed)
      elif mask_end:
        x = tiles.forbid(x, tiles.before(shape, keys - step * plan.step))
      weight = tiles.sloped(tiles.weights(x, lse), x, logit_cap)
      plgpu.barrier_wait(v_ready.at[slot])
      dweight = stream.product(do_own, stream.transposed(v_slot), plan.step)
      dx = tiles.logit_gradient(weight, dweight, delta).astype(jnp.bfloat16)
      dq = stream.add_product(dq, dx, k_slot)
      plgpu.barrier_arrive(read.at[slot])
      return dq

    dq = stream.zeros(ROWS, q_ref.shape[-1])
    ragged = segments is None and keys % plan.step > 0
    dq = lax.fori_loop(first, end - ragged, visit, dq)
    if ragged:
      dq = visit(end - 1, dq, mask_end=True)
    q_own[...] = (dq * scale).astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_own, dq_ref.at[batch, rows, head])
    plgpu.wait_smem_to_gmem(0)

  stream.role(
    compute,
    lambda: stream.copy_ahead(copy, first, end, plan.stages, [read]),
    plan.registers,
  )
