"""Run the forward pass of attention on Hopper, in Pallas Mosaic GPU.

A block of threads holds 128 queries of one head. Of its three warpgroups one
copies keys and values and two compute, 64 queries each, taking turns: while one
multiplies, the other takes exponentials (FlashAttention-3, section 3.1).
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


def forward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segments: tuple[jax.Array, jax.Array, jax.Array] | None,
  *,
  keys: int,
  scale: float,
  logit_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
  """Return the output and the log-sum-exp in base 2.

  Args:
    q: bf16 [B, N, H, D]; 8 divides N, 16 divides D.
    k: bf16 [B, M, Hkv, D], alike.
    v: bf16 [B, M, Hkv, D].
    segments: ids of the queries int [B, N up to a tile], ids of the keys
      int [B, M up to a step] and the steps that each tile of queries visits
      (`flash_gpu_plan.visited`); None for one segment.
    keys: number of keys that count: M, but for padding.
    scale: factor of the logits.
    logit_cap: see `ops.attention`.

  Returns:
    bf16 [B, N, H, D] and f32 [B, H, N up to a tile].
  """
  batch, n, heads, dim = q.shape
  plan = plan_lib.forward(dim)
  packed = segments is not None
  num_tiles = pl.cdiv(n, TILE)
  barrier = functools.partial(plgpu.Barrier, num_barriers=plan.stages)
  scratch = dict(
    q_smem=stream.matrix(COMPUTE, ROWS, dim),
    k_smem=stream.matrix(plan.stages, plan.step, dim),
    v_smem=stream.matrix(plan.stages, plan.step, dim),
    lse_smem=plgpu.SMEM((COMPUTE, ROWS), jnp.float32),
    q_ready=plgpu.Barrier(num_barriers=COMPUTE, num_arrivals=1 + packed),
    k_ready=barrier(num_arrivals=1 + packed),
    v_ready=barrier(num_arrivals=1),
    k_read=barrier(num_arrivals=COMPUTE),
    v_read=barrier(num_arrivals=COMPUTE),
    turns=plgpu.Barrier(num_arrivals=COMPUTE),
  )
  if packed:
    scratch |= dict(
      q_ids_smem=plgpu.SMEM((COMPUTE, ROWS), jnp.int32),
      k_ids_smem=plgpu.SMEM((plan.stages, plan.step), jnp.int32),
    )
  body = functools.partial(
    _packed if packed else _whole,
    plan=plan,
    groups=heads // k.shape[2],
    keys=keys,
    scale=scale,
    logit_cap=logit_cap,
  )
  out, lse = plgpu.kernel(
    body,
    out_type=[
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      jax.ShapeDtypeStruct((batch, heads, num_tiles * TILE), jnp.float32),
    ],
    scratch_types=scratch,
    grid=(num_tiles, heads, batch),
    grid_names=stream.GRID,
    num_threads=COMPUTE + 1,
    thread_name=stream.AXIS,
    compiler_params=plgpu.CompilerParams(approx_math=True),
    kernel_name='vfm_attention_forward',
  )(q, k, v, *(segments or ()))
  return out, lse


def _whole(q_ref, k_ref, v_ref, out_ref, lse_ref, **rest):
  _body(q_ref, k_ref, v_ref, None, out_ref, lse_ref, **rest)


def _packed(
  q_ref, k_ref, v_ref, q_ids, k_ids, ranges, out_ref, lse_ref, **rest
):
  _body(
    q_ref, k_ref, v_ref, (q_ids, k_ids, ranges), out_ref, lse_ref, **rest
  )  # fmt: skip


def _body(
  q_ref: Any,
  k_ref: Any,
  v_ref: Any,
  segments: tuple[Any, Any, Any] | None,
  out_ref: Any,
  lse_ref: Any,
  *,
  plan: Plan,
  groups: int,
  keys: int,
  scale: float,
  logit_cap: float | None,
  q_smem: Any,
  k_smem: Any,
  v_smem: Any,
  lse_smem: Any,
  q_ready: Any,
  k_ready: Any,
  v_ready: Any,
  k_read: Any,
  v_read: Any,
  turns: Any,
  q_ids_smem: Any = None,
  k_ids_smem: Any = None,
):
  tile, head, batch = (lax.axis_index(a) for a in stream.GRID)
  kv_head = lax.div(head, jnp.int32(groups))
  shape = (ROWS, plan.step)
  ragged = segments is None and keys % plan.step > 0
  if segments is None:
    first, end = jnp.int32(0), jnp.int32(pl.cdiv(keys, plan.step))
  else:
    first, end = segments[2][batch, tile, 0], segments[2][batch, tile, 1]

  def turn():
    plgpu.barrier_arrive(turns)
    plgpu.barrier_wait(turns)

  def copy(step, slot):
    rows = pl.ds(step * plan.step, plan.step)
    if segments is not None:
      plgpu.copy_gmem_to_smem(
        segments[1].at[batch, rows], k_ids_smem.at[slot], k_ready.at[slot]
      )
    plgpu.copy_gmem_to_smem(
      k_ref.at[batch, rows, kv_head], k_smem.at[slot], k_ready.at[slot]
    )
    plgpu.copy_gmem_to_smem(
      v_ref.at[batch, rows, kv_head], v_smem.at[slot], v_ready.at[slot]
    )

  def compute(warpgroup):
    rows = pl.ds(tile * TILE + warpgroup * ROWS, ROWS)
    q_own, ready = q_smem.at[warpgroup], q_ready.at[warpgroup]
    plgpu.copy_gmem_to_smem(q_ref.at[batch, rows, head], q_own, ready)
    if segments is not None:
      plgpu.copy_gmem_to_smem(
        segments[0].at[batch, rows], q_ids_smem.at[warpgroup], ready
      )
    plgpu.barrier_wait(ready)
    q_ids: Any = (
      None if segments is None else stream.vector(q_ids_smem.at[warpgroup])
    )

    def visit(step, carry, mask_end=not plan.peel):
      acc, running = carry
      slot = lax.rem(step - first, jnp.int32(plan.stages))
      plgpu.barrier_wait(k_ready.at[slot])

      def multiply(ref):
        plgpu.wgmma(ref, q_own, stream.transposed(k_smem.at[slot]))
        turn()
        return ref[...]

      x = pl.run_scoped(multiply, stream.accumulator(*shape))
      x = tiles.logits(x, scale=scale, logit_cap=logit_cap)
      if segments is not None:
        k_ids = stream.vector(k_ids_smem.at[slot], queries=1)
        x = tiles.forbid(x, tiles.same_segment(q_ids, k_ids, shape))
      elif ragged and mask_end:
        x = tiles.forbid(x, tiles.before(shape, keys - step * plan.step))
      plgpu.barrier_arrive(k_read.at[slot])
      weight, factor, running = tiles.softmax_step(x, running)
      acc = acc * tiles.spread(factor, acc.shape, 0)
      weight = weight.astype(jnp.bfloat16)
      plgpu.barrier_wait(v_ready.at[slot])
      turn()
      acc = stream.add_product(acc, weight, v_smem.at[slot])
      plgpu.barrier_arrive(v_read.at[slot])
      return acc, running

    pl.when(warpgroup == 1)(turn)
    running = tiles.Running(
      *(
        plgpu.layout_cast(x, plgpu.Layout.WGMMA.reduce(1))
        for x in tiles.start(ROWS)
      )
    )
    carry: Any = stream.zeros(ROWS, q_ref.shape[-1]), running
    peeled = ragged and plan.peel
    carry = lax.fori_loop(first, end - peeled, visit, carry)
    if peeled:
      carry = visit(end - 1, carry, mask_end=True)
    pl.when(warpgroup == 0)(turn)

    acc, running = carry
    out, lse = tiles.finish(acc, running)
    q_own[...] = out.astype(jnp.bfloat16)
    lse_smem[warpgroup] = lse
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_own, out_ref.at[batch, rows, head])
    plgpu.copy_smem_to_gmem(
      lse_smem.at[warpgroup], lse_ref.at[batch, head, rows]
    )
    plgpu.wait_smem_to_gmem(0)

  stream.role(
    compute,
    lambda: stream.copy_ahead(copy, first, end, plan.stages, [k_read, v_read]),
    plan.registers,
  )
