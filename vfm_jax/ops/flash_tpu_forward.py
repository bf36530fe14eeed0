"""Compute attention in a Pallas kernel for TPUs.

The keys and values of a head stay in VMEM while the kernel goes over blocks of
queries, so that all logits of a query are there: there is one softmax, and
nothing is rescaled. Logits are transposed, keys down and queries across: then
reductions over the keys add whole registers, and statistics are plain vectors.

With segment ids a chunk of logits none of whose queries shares a segment with
any of its keys is skipped.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vfm_jax.ops import flash_tpu_tiles as tiles
from vfm_jax.ops.flash_tpu_plan import Plan

# Registers that a group of rows fills; more, and some are spilled.
_REGISTERS = 4


def forward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  ids: tuple[jax.Array, jax.Array] | None,
  *,
  scale: float,
  logit_cap: float | None,
  plan: Plan,
  out_dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array]:
  """Return the output and the log-sum-exp of the logits.

  Args:
    q: [B, H, N, D].
    k: [B, K, M, D]; K divides H.
    v: [B, K, M, D].
    ids: segments of queries and keys, int32 [B, N] and [B, M]; a query attends
      to the keys with its id.
    scale: factor of the logits.
    logit_cap: bound of the logits by tanh, or None.
    plan: sizes of the blocks.
    out_dtype: type of the output.

  Returns:
    [B, H, N, D] and f32 [B, H, N].
  """
  batch, heads, n, dim = q.shape
  m = k.shape[2]
  step, block, rows, chunk = plan.heads, plan.block, plan.rows, plan.chunk
  blocks, parts = pl.cdiv(n, block), block // rows
  group = heads // k.shape[1]
  own = pl.BlockSpec((1, step, block, dim), lambda b, h, i, *_: (b, h, i, 0))
  whole = pl.BlockSpec(
    (1, step, m, dim), lambda b, h, i, *_: (b, jax.lax.div(h, group), 0, 0)
  )
  # Transposed, and with rows of ones: their product with the weights is the
  # weights' sum, for nothing where D leaves lanes of the matrix unit unused.
  v = jnp.pad(
    v.swapaxes(2, 3), ((0, 0), (0, 0), (0, 8), (0, 0)), constant_values=1
  )
  turned = pl.BlockSpec((1, step, dim + 8, m), whole.index_map)
  in_specs, args, prefetch = [own, whole, turned], [q, k, v], []
  skipping = ids is not None and chunk < m
  buffers = 1 if skipping else 2
  if ids is not None:
    in_specs += [
      pl.BlockSpec((1, parts, 1, rows), lambda b, h, i, *_: (b, i, 0, 0)),
      pl.BlockSpec((1, m, 1), lambda b, h, i, *_: (b, 0, 0)),
    ]
    across = jnp.pad(ids[0], ((0, 0), (0, -n % block)), 'edge')
    args += [across.reshape(batch, -1, 1, rows), ids[1][:, :, None]]
    if skipping:
      prefetch = [tiles.live(across, ids[1], rows, chunk)]
  out, lse = pl.pallas_call(
    functools.partial(
      _forward_skipping if skipping else _forward_dense,
      scale=scale,
      logit_cap=logit_cap,
      chunk=chunk,
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(prefetch),
      grid=(batch, heads // step, blocks),
      in_specs=in_specs,
      out_specs=[
        own,
        pl.BlockSpec(
          (1, step, parts, 1, rows), lambda b, h, i, *_: (b, h, i, 0, 0)
        ),
      ],
      scratch_shapes=[
        *[pltpu.VMEM((1, m, rows), tiles.F32)] * buffers,
        *[pltpu.VMEM((m, rows), v.dtype)] * buffers,
        *[pltpu.VMEM((r, rows), tiles.F32) for r in (1, dim + 8) if skipping],
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct(q.shape, out_dtype),
      jax.ShapeDtypeStruct((batch, heads, blocks * parts, 1, rows), tiles.F32),
    ],
    compiler_params=tiles.compiler_params(plan),
    cost_estimate=tiles.cost(q, k, products=2, tensors=2),
    name='flash_tpu_forward',
  )(*prefetch, *args)
  return out, lse.reshape(batch, heads, blocks * block)[:, :, :n]


def _forward_dense(q_ref, k_ref, v_ref, *refs, scale, logit_cap, chunk):
  *ids, out_ref, lse_ref, logits_0, logits_1, weight_0, weight_1 = refs
  logits_refs, weight_refs = (logits_0, logits_1), (weight_0, weight_1)
  m, size = weight_0.shape
  units = tiles.units(q_ref, size)
  chunks = tiles.slices(m, chunk)
  factor = 1.0 if ids or logit_cap is not None else scale * tiles.LOG2_E

  def start(u, keys):
    x, rows = units[u]
    product = tiles.dot(
      k_ref[tiles.zero(u), x, keys], q_ref[0, x, rows], (1, 1)
    )
    same = ids and (ids[0][0, rows.start // size], ids[1][0, keys])
    return _store(logits_refs[u % 2], keys, product, same, scale, logit_cap)

  tops = [start(0, keys) for keys in chunks]
  for u, (x, rows) in enumerate(units):
    top = functools.reduce(jnp.maximum if factor > 0 else jnp.minimum, tops)
    tops, sums = [], 0.0
    for keys in chunks:
      # The matrix units have the logits of the next queries to do while the
      # weights of these are computed.
      if u + 1 < len(units):
        tops.append(start(u + 1, keys))
      weight_ref = weight_refs[u % 2]
      _weigh(logits_refs[u % 2], weight_ref, keys, top, factor)
      sums += tiles.dot(v_ref[0, x, :, keys], weight_ref[keys])
    _finish(out_ref, lse_ref, x, rows, sums, top * factor, bool(ids))


def _forward_skipping(
  live_ref, q_ref, k_ref, v_ref, q_ids_ref, k_ids_ref, out_ref, lse_ref,
  logits_ref, weight_ref, top_ref, sum_ref, *,
  scale, logit_cap, chunk,
):  # fmt: skip
  m, size = weight_ref.shape
  chunks = tiles.slices(m, chunk)
  parts = q_ref.shape[2] // size
  step = pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)
  for x, rows in tiles.units(q_ref, size):
    part = rows.start // size
    first = (step * parts + part) * len(chunks)
    top_ref[...] = jnp.full_like(top_ref, tiles.EMPTY)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    for c, keys in enumerate(chunks):

      @pl.when(live_ref[first + c] > 0)
      def _(x=x, rows=rows, part=part, keys=keys):
        product = tiles.dot(k_ref[0, x, keys], q_ref[0, x, rows], (1, 1))
        same = q_ids_ref[0, part], k_ids_ref[0, keys]
        top = _store(logits_ref, keys, product, same, scale, logit_cap)
        top_ref[...] = jnp.maximum(top_ref[...], top)

    for c, keys in enumerate(chunks):

      @pl.when(live_ref[first + c] > 0)
      def _(x=x, keys=keys):
        _weigh(logits_ref, weight_ref, keys, top_ref[...], 1.0)
        sum_ref[...] += tiles.dot(v_ref[0, x, :, keys], weight_ref[keys])

    _finish(out_ref, lse_ref, x, rows, sum_ref[...], top_ref[...], True)


def _store(logits_ref, keys, product, ids, scale, logit_cap):
  """Store logits [M, n], and return the largest of the columns, [1, n].

  What is stored, and returned, lacks its factor if there is nothing but it.
  """
  logits, most = product, jnp.max
  if ids or logit_cap is not None:
    logits, _ = tiles.bend(product, scale, logit_cap)
    if ids:
      logits = jnp.where(ids[1] == ids[0], logits, tiles.EMPTY)
  elif scale < 0:
    most = jnp.min
  logits_ref[0, keys] = logits
  return most(logits, axis=0, keepdims=True)


def _weigh(logits_ref, weight_ref, keys, top, factor):
  """Store the weights of logits [M, n]."""
  for group in tiles.groups(keys, logits_ref.shape[2], _REGISTERS):
    weight = jnp.exp2((logits_ref[tiles.zero(0), group] - top) * factor)
    weight_ref[group] = weight.astype(weight_ref.dtype)


def _finish(out_ref, lse_ref, x, rows, sums, top, masked):
  """Write outputs, given as sums [D + 8, n] of weights with top [1, n]."""
  dim = out_ref.shape[3]
  out, total = sums[:dim], sums[dim : dim + 1]
  inverse = 1.0 / total
  lse = (top + jnp.log2(total)) * (1 / tiles.LOG2_E)
  if masked:
    some = top > 0.5 * tiles.EMPTY
    inverse = jnp.where(some, inverse, 0.0)
    lse = jnp.where(some, lse, tiles.EMPTY)
  out_ref[0, x, rows] = (out * inverse).T.astype(out_ref.dtype)
  lse_ref[0, x, rows.start // out.shape[1]] = lse
