"""Attend with Pallas kernels on TPUs, forward and backward, not causal.

Keys (forward) and queries (backward) up to `RESIDENT` stay in VMEM; longer
ones are taken in parts, whose outputs are rescaled to each other by their
log-sum-exps, as between blocks of an online softmax.

Products of float32 inputs have the precision that JAX is set to
(`jax_default_matmul_precision`), as elsewhere; sums are float32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vfm_jax.ops import flash_tpu_backward, flash_tpu_forward, flash_tpu_plan
from vfm_jax.ops.attention_spec import RESIDUAL, Spec

RESIDENT = 4608


def refuse(spec: Spec) -> str | None:
  """Return why the kernels can not serve the call, or None."""
  if spec.platform != 'tpu':
    return f'needs a TPU, found {spec.platform}'
  if spec.dtype not in ('bfloat16', 'float32'):
    return f'needs bfloat16 or float32, found {spec.dtype}'
  if spec.head_dim % 8 or spec.head_dim > 256:
    return (
      f'needs a head_dim that 8 divides, at most 256, found {spec.head_dim}'
    )
  if spec.masked:
    return 'takes no mask, only segment ids'
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
  """Return softmax(scale q k^T) v over the heads.

  Args:
    q: [B, N, H, D].
    k: [B, M, K, D]; K divides H.
    v: [B, M, K, D].
    segment_ids: int32 [B, N] for N = M: tokens attend within their segment; a
      negative id attends to nothing, which gives 0. None for one segment.
    scale: factor of the logits.
    logit_cap: c of c tanh(logits / c), or None.

  Returns:
    [B, N, H, D] in the type of q.
  """
  return attend_with_lse(
    q,
    k,
    v,
    q_ids=segment_ids,
    k_ids=segment_ids,
    scale=scale,
    logit_cap=logit_cap,
  )[0]


def attend_with_lse(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  q_ids: jax.Array | None,
  k_ids: jax.Array | None,
  scale: float,
  logit_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
  """Return the output and the log-sum-exp; both may be differentiated.

  Args:
    q: [B, N, H, D].
    k: [B, M, K, D]; K divides H.
    v: [B, M, K, D].
    q_ids: int32 [B, N], as `segment_ids` of `attend`; None with `k_ids`.
    k_ids: int32 [B, M].
    scale: factor of the logits.
    logit_cap: c of c tanh(logits / c), or None.

  Returns:
    [B, N, H, D] in the type of q, and f32 [B, N, H], -1e30 where a query
    attends to nothing.
  """
  ids = None
  if q_ids is not None and k_ids is not None:
    # Padding of the one side is not padding of the other.
    ids = jnp.maximum(q_ids, -1), jnp.where(k_ids < 0, -2, k_ids)
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  found: Any = _attend(q, k, v, ids, scale, logit_cap)
  out, lse = found
  return out.swapaxes(1, 2), lse.swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, ids, scale, logit_cap):
  return _forward(q, k, v, ids, scale, logit_cap)[0]


def _forward(q, k, v, ids, scale, logit_cap):
  parts = _parts(k.shape[2])
  whole = len(parts) == 1
  out: Any = None
  lse: Any = None
  for cols in parts:
    more, more_lse = flash_tpu_forward.forward(
      q,
      k[:, :, cols],
      v[:, :, cols],
      ids and (ids[0], ids[1][:, cols]),
      scale=scale,
      logit_cap=logit_cap,
      plan=flash_tpu_plan.forward(q, k[:, :, cols], ids is not None),
      out_dtype=q.dtype if whole else jnp.float32,
    )
    if out is None:
      out, lse = more, more_lse
    else:
      both = jnp.logaddexp(lse, more_lse)
      out = (
        jnp.exp(lse - both)[..., None] * out
        + jnp.exp(more_lse - both)[..., None] * more
      )
      lse = both
  out = checkpoint_name(out.astype(q.dtype), RESIDUAL)
  lse = checkpoint_name(lse, RESIDUAL)
  return (out, lse), (q, k, v, ids, out, lse)


def _backward(scale, logit_cap, saved, grads):
  q, k, v, ids, out, lse = saved
  grad, grad_lse = grads
  inner = jnp.einsum(
    'bhnd,bhnd->bhn', out, grad, preferred_element_type=jnp.float32
  )
  inner -= grad_lse
  parts = _parts(q.shape[2])
  batch, heads, m, dim = k.shape
  whole = len(parts) == 1 and heads == q.shape[1]
  results = [
    flash_tpu_backward.backward(
      q[:, :, rows],
      k,
      v,
      grad[:, :, rows],
      lse[:, :, rows],
      inner[:, :, rows],
      ids and (ids[0][:, rows], ids[1]),
      scale=scale,
      logit_cap=logit_cap,
      plan=flash_tpu_plan.backward(q[:, :, rows], k, ids is not None),
      kv_dtype=k.dtype if whole else jnp.float32,
    )
    for rows in parts
  ]
  dq, dk, dv = zip(*results, strict=True)
  dk, dv = (
    functools.reduce(jnp.add, x)
    .reshape(batch, heads, -1, m, dim)
    .sum(2)
    .astype(k.dtype)
    for x in (dk, dv)
  )
  return jnp.concatenate(dq, axis=2), dk, dv, None


_attend.defvjp(_forward, _backward)


def _parts(length):
  """Cut a length into the fewest parts that are resident, equal to 128."""
  count = -(-length // RESIDENT)
  size = -(-length // count // 128) * 128 if count > 1 else length
  return [slice(at, min(at + size, length)) for at in range(0, length, size)]
