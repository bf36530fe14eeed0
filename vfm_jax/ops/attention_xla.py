"""Compute attention with XLA: everywhere, and with more memory saved on CPU."""

import jax
import jax.numpy as jnp

from vfm_jax.ops.attention_spec import Spec


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  mask: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  scale: float,
  logit_cap: float | None = None,
) -> jax.Array:
  """Return softmax(scale q k^T) v with every option; see `ops.attention`."""
  mask = join(mask, segment_ids)
  q, k, v = (x.swapaxes(1, 2) for x in (q, *_spread(q, k, v)))
  logits = _dot('bhnd,bhmd->bhnm', q, k) * scale
  if logit_cap is not None:
    logits = logit_cap * jnp.tanh(logits / logit_cap)
  if mask is None:
    weight = jax.nn.softmax(logits, axis=-1)
  else:
    weight = jax.nn.softmax(jnp.where(mask, logits, -1e30), axis=-1)
    weight = jnp.where(mask, weight, 0.0)
  out = _dot('bhnm,bhmd->bhnd', weight.astype(v.dtype), v)
  return out.astype(q.dtype).swapaxes(1, 2)


def join(
  mask: jax.Array | None, segment_ids: jax.Array | None
) -> jax.Array | None:
  """Fold segment ids into the mask, bool broadcastable to [B, H, N, M]."""
  if segment_ids is None:
    return mask
  same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
  same &= segment_ids[:, None, :, None] >= 0
  return same if mask is None else same & mask


def refuse_saved(spec: Spec) -> str | None:
  """Say why `attend_saved` can not be used, or None."""
  if spec.platform != 'cpu':
    return f'is for the CPU, found {spec.platform}'
  if spec.dtype != 'float32':
    return f'needs float32, found {spec.dtype}'
  if spec.masked or spec.segments:
    return 'takes no mask and no segment ids'
  if spec.logit_cap:
    return 'takes no logit cap'
  return None


def attend_saved(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  mask: None = None,
  segment_ids: None = None,
  scale: float,
  logit_cap: None = None,
) -> jax.Array:
  """Return softmax(scale q k^T) v, with the weights saved for the gradient."""
  del mask, segment_ids, logit_cap  # refused
  q, k, v = (x.swapaxes(1, 2) for x in (q * scale, *_spread(q, k, v)))
  return _saved(q, k, v).swapaxes(1, 2)


@jax.custom_vjp
def _saved(q, k, v):
  """Attend with q [B, H, N, D], already scaled, to k and v [B, H, M, D].

  On CPU the passes over the N x M weights cost as much as the products. The
  weights stay without their normaliser, which goes to the outputs instead, and
  are saved for a backward pass that touches them three times.
  """
  return _saved_forward(q, k, v)[0]


def _saved_forward(q, k, v):
  logits = _dot('bhnd,bhmd->bhnm', q, k)
  weight = jnp.exp(logits - logits.max(-1, keepdims=True))
  inverse = 1.0 / weight.sum(-1, keepdims=True)
  out = _dot('bhnm,bhmd->bhnd', weight, v) * inverse
  return out, (q, k, v, weight, inverse, out)


def _saved_backward(saved, grad):
  q, k, v, weight, inverse, out = saved
  grad = grad * inverse
  inner = (grad * out).sum(-1, keepdims=True)
  dv = _dot('bhnm,bhnd->bhmd', weight, grad)
  # The product takes `inner` off too: no further pass over the weights.
  less = jnp.concatenate([grad, -inner], axis=-1)
  ones = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
  dlogits = weight * _dot('bhnd,bhmd->bhnm', less, ones)
  dq = _dot('bhnm,bhmd->bhnd', dlogits, k)
  dk = _dot('bhnm,bhnd->bhmd', dlogits, q)
  return dq, dk, dv


_saved.defvjp(_saved_forward, _saved_backward)


def _spread(q, k, v):
  """Repeat the heads of k and v for the heads of q that share them."""
  groups = q.shape[2] // k.shape[2]
  if groups == 1:
    return k, v
  return jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)


def _dot(equation, a, b):
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
