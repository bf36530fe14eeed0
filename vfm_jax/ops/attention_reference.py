"""Compute attention and its gradients in float64: the oracle of every test.

NumPy alone, a head at a time, with nothing that could be called clever.
"""

from typing import Any, NamedTuple

import numpy as np


class Attended(NamedTuple):
  """Hold what attention computes.

  Attributes:
    out: f64 [B, N, H, D].
    lse: f64 [B, H, N], log of the sum of the exponentials of the logits; -inf
      for a query that attends to nothing.
  """

  out: np.ndarray
  lse: np.ndarray


class Gradients(NamedTuple):
  """Hold the gradients of sum(out * cotangent), f64 in the inputs' shapes."""

  q: np.ndarray
  k: np.ndarray
  v: np.ndarray


def reference_attention(
  q: Any,
  k: Any,
  v: Any,
  *,
  mask: Any = None,
  segment_ids: Any = None,
  scale: float | None = None,
  logit_cap: float | None = None,
) -> Attended:
  """Attend as `ops.attention.attention` says, in float64.

  Args:
    q: [B, N, H, D].
    k: [B, M, Hkv, D], where Hkv divides H.
    v: [B, M, Hkv, D].
    mask: bool, broadcastable to [B, H, N, M]; True = may attend.
    segment_ids: int [B, N]; a negative one attends to nothing.
    scale: factor of the logits; D^-0.5 if None.
    logit_cap: c in c tanh(logits / c); None for no cap.
  """
  q, k, v = _spread(q, k, v)
  weight, lse, _ = _softmax(q, k, mask, segment_ids, scale, logit_cap)
  return Attended(np.einsum('bhnm,bmhd->bnhd', weight, v), lse)


def reference_gradients(
  q: Any,
  k: Any,
  v: Any,
  cotangent: Any,
  *,
  mask: Any = None,
  segment_ids: Any = None,
  scale: float | None = None,
  logit_cap: float | None = None,
) -> Gradients:
  """Return the gradients of sum(out * cotangent), cotangent [B, N, H, D]."""
  groups, kv_heads = np.shape(q)[2] // np.shape(k)[2], np.shape(k)[2]
  q, k, v = _spread(q, k, v)
  do = np.asarray(cotangent, np.float64)
  weight, _, slope = _softmax(q, k, mask, segment_ids, scale, logit_cap)
  dv = np.einsum('bhnm,bnhd->bmhd', weight, do)
  dweight = np.einsum('bnhd,bmhd->bhnm', do, v)
  inner = np.sum(weight * dweight, axis=-1, keepdims=True)
  dlogits = weight * (dweight - inner) * slope
  dq = np.einsum('bhnm,bmhd->bnhd', dlogits, k)
  dk = np.einsum('bhnm,bnhd->bmhd', dlogits, q)
  b, m, _, d = dk.shape
  dk, dv = (x.reshape(b, m, kv_heads, groups, d).sum(3) for x in (dk, dv))
  return Gradients(dq, dk, dv)


def _spread(q, k, v):
  """Return all in float64, with as many heads of k and v as of q."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  groups = q.shape[2] // k.shape[2]
  return q, np.repeat(k, groups, axis=2), np.repeat(v, groups, axis=2)


def _softmax(q, k, mask, segment_ids, scale, logit_cap):
  """Return weights [B, H, N, M], lse [B, H, N] and d logits / d (q k)."""
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  logits = scale * np.einsum('bnhd,bmhd->bhnm', q, k)
  slope = np.full_like(logits, scale)
  if logit_cap is not None:
    tanh = np.tanh(logits / logit_cap)
    logits, slope = logit_cap * tanh, slope * (1 - tanh**2)
  allowed = np.broadcast_to(
    True if mask is None else np.asarray(mask), logits.shape
  )
  if segment_ids is not None:
    ids = np.asarray(segment_ids)
    same = (ids[:, :, None] == ids[:, None]) & (ids[:, :, None] >= 0)
    allowed = allowed & same[:, None]
  top = np.max(logits, axis=-1, keepdims=True, where=allowed, initial=-1e300)
  weight = np.where(allowed, np.exp(np.where(allowed, logits - top, 0)), 0)
  total = weight.sum(-1, keepdims=True)
  empty = total == 0
  total = np.where(empty, 1, total)
  lse = np.where(empty, -np.inf, top + np.log(total))[..., 0]
  return weight / total, lse, slope
