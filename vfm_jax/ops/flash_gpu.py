"""Attend on Hopper with kernels in Pallas Mosaic GPU: the differentiable call.

bfloat16, not causal. The wrapper pads head_dim to a multiple of 16 and tokens
to a multiple of 8, as copies of tiles need it; ragged ends of tiles are filled
and cut off by the copies.
"""

import functools
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vfm_jax.ops import flash_gpu_plan as plan_lib
from vfm_jax.ops.attention_spec import RESIDUAL, Spec

# The oldest that the kernels were compiled with.
JAX = (0, 12, 0)
HOPPER = (9, 0)
MAX_HEAD_DIM = 128


class Options(NamedTuple):
  """Hold what is static in a call; see `ops.attention`."""

  scale: float
  logit_cap: float | None


def refuse(spec: Spec) -> str | None:
  """Say why the kernels can not be used for a call, or None."""
  if spec.platform != 'gpu':
    return f'needs a GPU, found {spec.platform}'
  if spec.capability != HOPPER:
    found = '.'.join(map(str, spec.capability or ('unknown',)))
    return f'needs a Hopper GPU (compute capability 9.0), found {found}'
  if spec.jax < JAX:
    found = '.'.join(map(str, spec.jax))
    return f'needs jax {".".join(map(str, JAX))}, found {found}'
  if spec.dtype != 'bfloat16':
    return f'needs bfloat16, found {spec.dtype}'
  if spec.head_dim > MAX_HEAD_DIM:
    return f'needs a head_dim up to {MAX_HEAD_DIM}, found {spec.head_dim}'
  if spec.masked:
    return 'takes no mask'
  return None


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  segment_ids: jax.Array | None,
  scale: float,
  logit_cap: float | None,
) -> jax.Array:
  """Return softmax(scale q k^T) v.

  Args:
    q: bf16 [B, N, H, D].
    k: bf16 [B, M, Hkv, D].
    v: bf16 [B, M, Hkv, D].
    segment_ids: int [B, N] or None; negative ids attend to nothing.
    scale: factor of the logits.
    logit_cap: c in c tanh(logits / c), or None.

  Returns:
    bf16 [B, N, H, D].
  """
  return _attend(Options(scale, logit_cap), q, k, v, segment_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, segment_ids):
  return _forward(options, q, k, v, segment_ids)[0]


def _forward(options, q, k, v, segment_ids):
  kernels = _kernels()[0]
  n, m, dim = q.shape[1], k.shape[1], q.shape[3]
  segments = None
  if segment_ids is not None:
    segments = segments_of(
      segment_ids, plan_lib.forward(_wide(dim)).step, of_queries=True
    )
  out, lse = kernels.forward(
    pad(q), pad(k), pad(v), segments, keys=m, **options._asdict()
  )
  out = checkpoint_name(out[:, :n, :, :dim], RESIDUAL)
  lse = checkpoint_name(lse, RESIDUAL)
  return out, (q, k, v, segment_ids, out, lse)


def _backward(options, saved, do):
  _, of_q, of_kv = _kernels()
  q, k, v, segment_ids, out, lse = saved
  (n, dim), m = (q.shape[1], q.shape[3]), k.shape[1]
  delta = jnp.einsum(
    'bnhd,bnhd->bhn', do, out, preferred_element_type=jnp.float32
  )
  delta = jnp.pad(delta, ((0, 0), (0, 0), (0, lse.shape[2] - n)))
  given = pad(q), pad(k), pad(v), pad(do), lse, delta
  for_q = for_kv = None
  if segment_ids is not None:
    plan = plan_lib.backward_q()
    for_q = segments_of(segment_ids, plan.step, of_queries=True)
    plan = plan_lib.backward_kv(_wide(dim), masked=True)
    for_kv = segments_of(
      segment_ids, plan.step, tile=plan.tile, of_queries=False
    )
  options = options._asdict()
  dq = of_q.backward_q(*given, for_q, keys=m, **options)
  dk, dv = of_kv.backward_kv(*given, for_kv, **options)
  dk, dv = (x[:, :m, :, :dim] for x in (dk, dv))
  return dq[:, :n, :, :dim], dk, dv, None


_attend.defvjp(_forward, _backward)


def pad(x: jax.Array) -> jax.Array:
  """Pad tokens to a multiple of 8 and features to one of 16, with zeros."""
  tokens = -x.shape[1] % 8
  features = _wide(x.shape[3]) - x.shape[3]
  if not tokens and not features:
    return x
  return jnp.pad(x, ((0, 0), (0, tokens), (0, 0), (0, features)))


def segments_of(
  ids: jax.Array,
  step: int,
  *,
  tile: int = plan_lib.TILE,
  of_queries: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Return what a kernel needs to know about segments.

  Args:
    ids: segment ids int [B, N]; negative ones are padding.
    step: tokens that the kernel streams at a time.
    tile: tokens of one of its tiles.
    of_queries: whether its tiles are of queries, and its steps of keys.

  Returns:
    Ids of the tiles [B, tiles * tile], ids of the steps, both with ids of
    padding that differ, and the range of steps of each tile [B, tiles, 2].
  """
  own, streamed = plan_lib.PADDED_QUERY, plan_lib.PADDED_KEY
  if not of_queries:
    own, streamed = streamed, own
  here = _pad_ids(ids, tile, own)
  # To a multiple of the tile too: the log-sum-exp is as long.
  there = _pad_ids(ids, max(step, plan_lib.TILE), streamed)
  return here, there, plan_lib.visited(here, there, tile, step)


def _pad_ids(ids: jax.Array, multiple: int, padding: int) -> jax.Array:
  ids = jnp.where(ids < 0, padding, ids).astype(jnp.int32)
  short = -ids.shape[1] % multiple
  return jnp.pad(ids, ((0, 0), (0, short)), constant_values=padding)


def _wide(dim: int) -> int:
  return plan_lib.padded(dim, 16)


def _kernels() -> tuple[ModuleType, ModuleType, ModuleType]:
  """Import the kernels late: their backend changes often, and few use it."""
  from vfm_jax.ops import flash_gpu_dkv, flash_gpu_dq, flash_gpu_forward

  return flash_gpu_forward, flash_gpu_dq, flash_gpu_dkv
