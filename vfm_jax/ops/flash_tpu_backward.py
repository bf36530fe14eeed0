"""Compute the gradients of attention in one Pallas kernel for TPUs.

The mirror image of the forward kernel: queries and the gradients of the output
stay in VMEM while the kernel goes over blocks of keys. The gradients of keys
and values are complete with their block; those of the queries are summed in
VMEM, as columns. Five products, none of which transposes an N x M matrix.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vfm_jax.ops import flash_tpu_tiles as tiles
from vfm_jax.ops.flash_tpu_plan import Plan

# Registers that a group of rows fills; more, and some are spilled.
_REGISTERS = 4


def backward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  grad: jax.Array,
  lse: jax.Array,
  inner: jax.Array,
  ids: tuple[jax.Array, jax.Array] | None,
  *,
  scale: float,
  logit_cap: float | None,
  plan: Plan,
  kv_dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Return the gradients of q, k and v, the latter for every query head.

  Args:
    q: [B, H, N, D].
    k: [B, K, M, D]; K divides H.
    v: [B, K, M, D].
    grad: [B, H, N, D], the gradient of the output.
    lse: f32 [B, H, N] of all keys, of which `k` may be a part.
    inner: f32 [B, H, N], the inner product of output and gradient less the
      gradient of `lse`.
    ids: as in `forward`.
    scale: factor of the logits.
    logit_cap: bound of the logits by tanh, or None.
    plan: sizes of the blocks.
    kv_dtype: type of the last two results.

  Returns:
    [B, H, N, D], [B, H, M, D], [B, H, M, D].
  """
  batch, heads, n, dim = q.shape
  m = k.shape[2]
  step, block, rows, chunk = plan.heads, plan.block, plan.rows, plan.chunk
  blocks = pl.cdiv(m, block)
  group = heads // k.shape[1]
  # The weights of a row that attends to nothing are exp(-1e30) then.
  lse = jnp.where(lse > 0.5 * tiles.EMPTY, lse * tiles.LOG2_E, -tiles.EMPTY)
  stats = jnp.stack([lse, inner], axis=2)
  own = pl.BlockSpec(
    (1, step, block, dim), lambda b, h, i, *_: (b, jax.lax.div(h, group), i, 0)
  )
  out = pl.BlockSpec((1, step, block, dim), lambda b, h, i, *_: (b, h, i, 0))
  whole = pl.BlockSpec((1, step, n, dim), lambda b, h, i, *_: (b, h, 0, 0))
  in_specs = [
    whole,
    own,
    own,
    whole,
    pl.BlockSpec((1, step, 2, n), lambda b, h, i, *_: (b, h, 0, 0)),
  ]
  args, prefetch = [q, k, v, grad, stats], []
  skipping = ids is not None and chunk < n
  if ids is not None:
    in_specs += [
      pl.BlockSpec((1, 1, n), lambda b, h, i, *_: (b, 0, 0)),
      pl.BlockSpec((1, block, 1), lambda b, h, i, *_: (b, i, 0)),
    ]
    args += [ids[0][:, None], ids[1][:, :, None]]
    if skipping:
      prefetch = [tiles.live(ids[1], ids[0], rows, chunk)]
  scratch = [
    *[pltpu.VMEM((rows, chunk), tiles.F32)] * 4,
    *[pltpu.VMEM((rows, chunk), q.dtype)] * 4,
    *[pltpu.VMEM((step, block, dim), tiles.F32)] * 2,
    pltpu.VMEM((step, dim, n), tiles.F32),
  ]
  kernel = functools.partial(
    _backward_kernel,
    scale=scale,
    logit_cap=logit_cap,
    chunk=chunk,
    keys=m,
    masked=ids is not None,
    skipping=skipping,
  )
  return pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(prefetch),
      grid=(batch, heads // step, blocks),
      in_specs=in_specs,
      out_specs=[whole, out, out],
      scratch_shapes=scratch,
    ),
    out_shape=[
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      *[jax.ShapeDtypeStruct((batch, heads, m, dim), kv_dtype)] * 2,
    ],
    compiler_params=tiles.compiler_params(plan),
    cost_estimate=tiles.cost(q, k, products=5, tensors=4),
    name='flash_tpu_backward',
  )(*prefetch, *args)


def _backward_kernel(*refs, scale, logit_cap, chunk, keys, masked, skipping):
  refs = list(refs)
  live_ref: Any = refs.pop(0) if skipping else None
  q_ref, k_ref, v_ref, grad_ref, stats_ref, *ids = refs[: 7 if masked else 5]
  dq_ref, dk_ref, dv_ref, *refs = refs[5 + len(ids) :]
  *scratch, dk_sum_ref, dv_sum_ref, dq_sum_ref = refs
  block, n, size = k_ref.shape[2], q_ref.shape[2], scratch[0].shape[0]
  chunks = tiles.slices(n, chunk)
  i = pl.program_id(2)

  @pl.when(i == 0)
  def _():
    dq_sum_ref[...] = jnp.zeros_like(dq_sum_ref)

  dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
  dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)
  units = [(x, rows, c) for x, rows in tiles.units(k_ref, size) for c in chunks]

  def real(rows):
    row = jax.lax.broadcasted_iota(jnp.int32, (rows.stop - rows.start, 1), 0)
    return row < keys - i * block - rows.start

  def load(ref, u):
    x, rows, _ = units[u]
    value = ref[tiles.zero(u), x, rows]
    if keys % block:
      # What lies past the last key is not defined.
      value = jnp.where(real(rows), value, jnp.zeros_like(value))
    return value

  def start(u):
    x, _, cols = units[u]
    wide = slice(0, cols.stop - cols.start)
    k, v = (load(ref, u) for ref in (k_ref, v_ref))
    logits_ref, dweight_ref, *_ = scratch[u % 2 :: 2]
    logits_ref[:, wide] = tiles.dot(k, q_ref[0, x, cols], (1, 1))
    dweight_ref[:, wide] = tiles.dot(v, grad_ref[0, x, cols], (1, 1))

  def finish(u):
    x, rows, cols = units[u]
    wide = slice(0, cols.stop - cols.start)
    logits_ref, dweight_ref, weight_ref, dlogits_ref = scratch[u % 2 :: 2]
    for group in tiles.groups(slice(0, size), wide.stop, _REGISTERS):
      own = slice(rows.start + group.start, rows.start + group.stop)
      logits, slope = tiles.bend(logits_ref[group, wide], scale, logit_cap)
      weight = jnp.exp2(logits - stats_ref[0, x, :1, cols])
      keep = real(own) if keys % block else None
      if ids:
        same = ids[1][0, own] == ids[0][0, :, cols]
        keep = same if keep is None else keep & same
      if keep is not None:
        weight = jnp.where(keep, weight, 0.0)
      dweight = dweight_ref[group, wide] - stats_ref[0, x, 1:, cols]
      dlogits = weight * dweight
      if slope is not None:
        dlogits *= slope
      weight_ref[group, wide] = weight.astype(weight_ref.dtype)
      dlogits_ref[group, wide] = dlogits.astype(dlogits_ref.dtype)
    dlogits = dlogits_ref[:, wide]
    dv_sum_ref[x, rows] += tiles.dot(weight_ref[:, wide], grad_ref[0, x, cols])
    dk_sum_ref[x, rows] += tiles.dot(dlogits, q_ref[0, x, cols])
    dq_sum_ref[x, :, cols] += tiles.dot(load(k_ref, u), dlogits, (0, 0))

  if skipping:
    subs = block // size
    first = (pl.program_id(0) * pl.num_programs(2) + i) * subs * len(chunks)
    for u in range(len(units)):

      @pl.when(live_ref[first + u % (subs * len(chunks))] > 0)
      def _(u=u):
        start(u)
        finish(u)

  else:
    start(0)
    for u in range(len(units)):
      if u + 1 < len(units):
        # Its products keep the matrix units busy during the softmax.
        start(u + 1)
      finish(u)
  dk_ref[0] = (dk_sum_ref[...] * scale).astype(dk_ref.dtype)
  dv_ref[0] = dv_sum_ref[...].astype(dv_ref.dtype)

  @pl.when(i == pl.num_programs(2) - 1)
  def _():
    for x in range(q_ref.shape[1]):
      for cols in chunks:
        dq = dq_sum_ref[x, :, cols].T * scale
        dq_ref[0, x, cols] = dq.astype(dq_ref.dtype)
