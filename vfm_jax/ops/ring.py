"""Attend to keys and values that go round a ring of devices.

Each device holds a part of the tokens. Its queries meet the keys and values of
one part at a time, in float32, and keep a running log-sum-exp, so that nothing
of the size of all tokens is ever there; the blocks travel from neighbour to
neighbour meanwhile (Liu et al. 2023, arXiv:2310.01889). The backward pass goes
round once more, and the gradients of a block travel with it until they are
home. With one part this is plain attention, without a ring.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Logits of what may not be attended to, and the least a row can have seen.
_LOW = -1e30


class How(NamedTuple):
  """Hold what does not depend on the arrays.

  Attributes:
    axis: mesh axis that the tokens are cut over.
    parts: into how many parts; 1 for keys and values that are all here.
    scale: factor of the logits.
    logit_cap: c in c tanh(logit / c); None for no cap.
  """

  axis: str
  parts: int
  scale: float
  logit_cap: float | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
  how: How,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  q_ids: jax.Array | None,
  k_ids: jax.Array | None,
) -> jax.Array:
  """Return this device's rows [B, N, H, D]; call under `jax.shard_map`.

  Args:
    how: see `How`.
    q: [B, N, H, D] queries of this device.
    k: [B, M, Hkv, D] keys of this device; Hkv divides H.
    v: [B, M, Hkv, D].
    q_ids: int32 [B, N] segments; those that differ do not see each other, and
      negative ones see nothing. None for one segment.
    k_ids: int32 [B, M], with them.
  """
  return _forward(how, q, k, v, q_ids, k_ids)[0]


def _forward(how, q, k, v, q_ids, k_ids):
  b, n, heads, d = q.shape
  groups = _grouped(q, k.shape[2])
  rows = (b, k.shape[2], heads // k.shape[2], n)

  def meet(carry, block):
    top, total, out = carry
    keys, values, ids = block
    logits = _logits(how, groups, keys, q_ids, ids)
    new = jnp.maximum(top, logits.max(-1))
    weight = jnp.where(logits > _LOW, jnp.exp(logits - new[..., None]), 0.0)
    old = jnp.exp(top - new)
    part = _dot('bgrnm,bmgd->bgrnd', weight.astype(values.dtype), values)
    return (
      new,
      total * old + weight.sum(-1),
      out * old[..., None] + part,
    )

  start = (
    jnp.full(rows, _LOW, jnp.float32),
    jnp.zeros(rows, jnp.float32),
    jnp.zeros((*rows, d), jnp.float32),
  )
  carry, block = start, (k, v, k_ids)
  if how.parts > 1:
    # The next block is on its way while this one is met.
    def step(state, _):
      carry, block = state
      return (meet(carry, block), _pass_on(how, block)), None

    (carry, block), _ = jax.lax.scan(step, (carry, block), length=how.parts - 1)
  top, total, out = meet(carry, block)
  # A row that saw nothing has no weights to normalise, and none to restore.
  some = jnp.where(total > 0, total, 1.0)
  out = _ungrouped(out / some[..., None]).astype(q.dtype)
  return out, (q, k, v, q_ids, k_ids, out, top + jnp.log(some))


def _backward(how, saved, grad):
  q, k, v, q_ids, k_ids, out, lse = saved
  kv_heads = k.shape[2]
  groups, grads = _grouped(q, kv_heads), _grouped(grad, kv_heads)
  inner = grads.astype(jnp.float32) * _grouped(out, kv_heads)
  inner = jnp.moveaxis(inner.sum(-1), 1, -1)[..., None]

  def meet(dq, block, dk, dv):
    keys, values, ids = block
    logits = _logits(how, groups, keys, q_ids, ids)
    weight = jnp.where(logits > _LOW, jnp.exp(logits - lse[..., None]), 0.0)
    dv = dv + _dot('bgrnm,bngrd->bmgd', weight.astype(grad.dtype), grads)
    change = _dot('bngrd,bmgd->bgrnm', grads, values) - inner
    change = weight * change * how.scale
    if how.logit_cap is not None:
      capped = jnp.where(logits > _LOW, logits / how.logit_cap, 0.0)
      change *= 1.0 - jnp.square(capped)
    change = change.astype(q.dtype)
    dq = dq + _dot('bgrnm,bmgd->bgrnd', change, keys)
    return dq, dk + _dot('bgrnm,bngrd->bmgd', change, groups), dv

  b, n, heads, d = q.shape
  dq = jnp.zeros((b, kv_heads, heads // kv_heads, n, d), jnp.float32)
  dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (k, v))
  block = (k, v, k_ids)
  if how.parts == 1:
    dq, dk, dv = meet(dq, block, dk, dv)
  else:

    def step(state, _):
      dq, block, dk, dv = state
      dq, dk, dv = meet(dq, block, dk, dv)
      return (dq, *_pass_on(how, (block, dk, dv))), None

    (dq, _, dk, dv), _ = jax.lax.scan(
      step, (dq, block, dk, dv), length=how.parts
    )
  dq = _ungrouped(dq).astype(q.dtype)
  return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None


attend.defvjp(_forward, _backward)


def _logits(how, groups, keys, q_ids, k_ids):
  """Return f32 [B, G, R, N, M]; `_LOW` where nothing is to be seen."""
  logits = _dot('bngrd,bmgd->bgrnm', groups, keys) * how.scale
  if how.logit_cap is not None:
    logits = how.logit_cap * jnp.tanh(logits / how.logit_cap)
  if q_ids is None:
    return logits
  seen = (q_ids[:, :, None] == k_ids[:, None]) & (q_ids >= 0)[:, :, None]
  return jnp.where(seen[:, None, None], logits, _LOW)


def _grouped(x, kv_heads):
  """Return [B, N, G, R, D] of x [B, N, H, D]: R queries for a head of keys."""
  b, n, heads, d = x.shape
  return x.reshape(b, n, kv_heads, heads // kv_heads, d)


def _ungrouped(x):
  """Return [B, N, H, D] of x [B, G, R, N, D]."""
  b, g, r, n, d = x.shape
  return jnp.moveaxis(x, 3, 1).reshape(b, n, g * r, d)


def _pass_on(how, tree):
  """Give what this device holds to the next one of the ring."""
  ring = [(i, (i + 1) % how.parts) for i in range(how.parts)]
  return jax.tree.map(lambda x: jax.lax.ppermute(x, how.axis, ring), tree)


def _dot(equation, a, b):
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
