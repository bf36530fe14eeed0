"""Compute dk and dv on Hopper, in Pallas Mosaic GPU.

A block of threads holds keys and values of one head and streams the queries of
all heads that share it; see `flash_gpu_dq`.
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


def backward_kv(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  do: jax.Array,
  lse: jax.Array,
  delta: jax.Array,
  segments: tuple[jax.Array, jax.Array, jax.Array] | None,
  *,
  scale: float,
  logit_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
  """Return dk and dv, bf16 [B, M, Hkv, D].

  Queries and keys of padding need no mask: the first have a gradient of 0,
  and of the second nobody reads the rows.

  Args:
    q: see `flash_gpu_dq.backward_q`.
    k: see there.
    v: see there.
    do: see there.
    lse: see there.
    delta: see there.
    segments: ids of the keys int [B, M up to a tile], ids of the queries
      int [B, N up to a tile], and the steps of queries that each tile of keys
      visits; None for one segment.
    scale: see there.
    logit_cap: see there.
  """
  batch, n, heads, dim = q.shape
  m, kv_heads = k.shape[1], k.shape[2]
  packed = segments is not None
  plan = plan_lib.backward_kv(dim, masked=packed or logit_cap is not None)
  barrier = functools.partial(plgpu.Barrier, num_barriers=plan.stages)
  scratch = dict(
    k_smem=stream.matrix(COMPUTE, ROWS, dim),
    v_smem=stream.matrix(COMPUTE, ROWS, dim),
    q_smem=stream.matrix(plan.stages, plan.step, dim),
    do_smem=stream.matrix(plan.stages, plan.step, dim),
    lse_smem=plgpu.SMEM((plan.stages, plan.step), jnp.float32),
    delta_smem=plgpu.SMEM((plan.stages, plan.step), jnp.float32),
    own_ready=plgpu.Barrier(num_barriers=COMPUTE, num_arrivals=2 + packed),
    q_ready=barrier(num_arrivals=2 + packed),
    do_ready=barrier(num_arrivals=2),
    read=barrier(num_arrivals=COMPUTE),
  )
  if packed:
    scratch |= dict(
      k_ids_smem=plgpu.SMEM((COMPUTE, ROWS), jnp.int32),
      q_ids_smem=plgpu.SMEM((plan.stages, plan.step), jnp.int32),
    )
  body = functools.partial(
    _kv_packed if packed else _kv_body,
    plan=plan,
    groups=heads // kv_heads,
    queries=n,
    scale=scale,
    logit_cap=logit_cap,
  )
  shape = jax.ShapeDtypeStruct(k.shape, k.dtype)
  dk, dv = plgpu.kernel(
    body,
    out_type=[shape, shape],
    scratch_types=scratch,
    grid=(pl.cdiv(m, plan.tile), kv_heads, batch),
    grid_names=stream.GRID,
    num_threads=COMPUTE + 1,
    thread_name=stream.AXIS,
    compiler_params=plgpu.CompilerParams(approx_math=True),
    kernel_name='vfm_attention_dkv',
  )(q, k, v, do, lse, delta, *(segments or ()))
  return dk, dv


def _kv_packed(
  q, k, v, do, lse, delta, k_ids, q_ids, ranges, dk, dv, **rest
):  # fmt: skip
  ids = k_ids, q_ids, ranges
  _kv_body(q, k, v, do, lse, delta, dk, dv, segments=ids, **rest)


def _kv_body(
  q_ref: Any,
  k_ref: Any,
  v_ref: Any,
  do_ref: Any,
  lse_ref: Any,
  delta_ref: Any,
  dk_ref: Any,
  dv_ref: Any,
  *,
  plan: Plan,
  groups: int,
  queries: int,
  scale: float,
  logit_cap: float | None,
  k_smem: Any,
  v_smem: Any,
  q_smem: Any,
  do_smem: Any,
  lse_smem: Any,
  delta_smem: Any,
  own_ready: Any,
  q_ready: Any,
  do_ready: Any,
  read: Any,
  segments: tuple[Any, Any, Any] | None = None,
  k_ids_smem: Any = None,
  q_ids_smem: Any = None,
):
  tile, kv_head, batch = (lax.axis_index(a) for a in stream.GRID)
  shape = (ROWS, plan.step)
  if segments is None:
    first, end = jnp.int32(0), jnp.int32(pl.cdiv(queries, plan.step))
  else:
    first, end = segments[2][batch, tile, 0], segments[2][batch, tile, 1]
  # The heads that share these keys come one after the other.
  length = end - first
  visits = length * groups

  def copy(visit, slot):
    head = kv_head * groups + lax.div(visit, length)
    rows = pl.ds((first + lax.rem(visit, length)) * plan.step, plan.step)
    if segments is not None:
      plgpu.copy_gmem_to_smem(
        segments[1].at[batch, rows], q_ids_smem.at[slot], q_ready.at[slot]
      )
    for ref, smem, ready in (
      (q_ref, q_smem, q_ready),
      (do_ref, do_smem, do_ready),
    ):
      plgpu.copy_gmem_to_smem(
        ref.at[batch, rows, head], smem.at[slot], ready.at[slot]
      )
    for ref, smem, ready in (
      (lse_ref, lse_smem, q_ready),
      (delta_ref, delta_smem, do_ready),
    ):
      plgpu.copy_gmem_to_smem(
        ref.at[batch, head, rows], smem.at[slot], ready.at[slot]
      )

  def compute(warpgroup):
    if not plan.split:
      accumulate(warpgroup, tile * TILE + warpgroup * ROWS, True, True)
      return
    for own, (of_k, of_v) in enumerate(((True, False), (False, True))):
      pl.when(warpgroup == own)(
        functools.partial(accumulate, own, tile * ROWS, of_k, of_v)
      )

  def accumulate(warpgroup, start, of_k, of_v):
    rows = pl.ds(start, ROWS)
    ready = own_ready.at[warpgroup]
    k_own, v_own = k_smem.at[warpgroup], v_smem.at[warpgroup]
    plgpu.copy_gmem_to_smem(k_ref.at[batch, rows, kv_head], k_own, ready)
    plgpu.copy_gmem_to_smem(v_ref.at[batch, rows, kv_head], v_own, ready)
    if segments is not None:
      plgpu.copy_gmem_to_smem(
        segments[0].at[batch, rows], k_ids_smem.at[warpgroup], ready
      )
    plgpu.barrier_wait(ready)
    k_ids: Any = (
      None if segments is None else stream.vector(k_ids_smem.at[warpgroup])
    )

    def visit(i, carry):
      dk, dv = carry
      slot = lax.rem(i, jnp.int32(plan.stages))
      q_slot, do_slot = q_smem.at[slot], do_smem.at[slot]
      plgpu.barrier_wait(q_ready.at[slot])
      x = stream.product(k_own, stream.transposed(q_slot), plan.step)
      x = tiles.logits(x, scale=scale, logit_cap=logit_cap)
      if segments is not None:
        q_ids = stream.vector(q_ids_smem.at[slot], queries=1)
        allowed = tiles.same_segment(q_ids, k_ids, shape, queries=1)
        x = tiles.forbid(x, allowed)
      lse = stream.vector(lse_smem.at[slot], queries=1)
      weight = tiles.weights(x, lse, queries=1)
      plgpu.barrier_wait(do_ready.at[slot])
      if of_v:
        dv = stream.add_product(dv, weight.astype(jnp.bfloat16), do_slot)
      if of_k:
        weight = tiles.sloped(weight, x, logit_cap)
        dweight = stream.product(v_own, stream.transposed(do_slot), plan.step)
        delta = stream.vector(delta_smem.at[slot], queries=1)
        dx = tiles.logit_gradient(weight, dweight, delta, queries=1)
        dk = stream.add_product(dk, dx.astype(jnp.bfloat16), q_slot)
      plgpu.barrier_arrive(read.at[slot])
      return dk, dv

    dim = q_ref.shape[-1]
    dk, dv = (
      stream.zeros(ROWS, dim) if wanted else None for wanted in (of_k, of_v)
    )
    dk, dv = lax.fori_loop(jnp.int32(0), visits, visit, (dk, dv))
    # Each warpgroup has buffers of its own, which it has done with.
    if of_k:
      k_own[...] = (dk * scale).astype(jnp.bfloat16)
    if of_v:
      v_own[...] = dv.astype(jnp.bfloat16)
    plgpu.commit_smem()
    if of_k:
      plgpu.copy_smem_to_gmem(k_own, dk_ref.at[batch, rows, kv_head])
    if of_v:
      plgpu.copy_smem_to_gmem(v_own, dv_ref.at[batch, rows, kv_head])
    plgpu.wait_smem_to_gmem(0)

  stream.role(
    compute,
    lambda: stream.copy_ahead(copy, jnp.int32(0), visits, plan.stages, [read]),
    plan.registers,
  )
