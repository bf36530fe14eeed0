"""Compute attention through the best implementation that accepts the case.

An ordered list of implementations, each of which may refuse with a reason. To
add one, put an `Implementation` in `IMPLEMENTATIONS`: first means preferred.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Spec:
  """Describe a call, without arrays, so that it can be resolved anywhere.

  Attributes:
    platform: 'cpu', 'gpu' or 'tpu'.
    dtype: name of the element type of q, k and v.
    head_dim: features of one head.
    masked: whether a mask or segment ids are given.
  """

  platform: str
  dtype: str
  head_dim: int
  masked: bool = False


@dataclasses.dataclass(frozen=True)
class Implementation:
  """Name a way to compute attention, and say when it can not be used.

  Attributes:
    name: value for `impl`.
    refuse: returns the reason not to be used for a `Spec`, or None.
    run: function (q, k, v, mask, scale) -> [B, N, H, D].
  """

  name: str
  refuse: Callable[[Spec], str | None]
  run: Callable[..., jax.Array]


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  mask: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  scale: float | None = None,
  impl: str = 'auto',
) -> jax.Array:
  """Return softmax(scale q k^T) v over the heads.

  Softmax and accumulation are float32. A query that may attend to nothing
  gives 0.

  Args:
    q: [B, N, H, D].
    k: [B, M, H, D].
    v: [B, M, H, D].
    mask: bool, broadcastable to [B, H, N, M]; True = may attend, as in
      `jax.nn.dot_product_attention`.
    segment_ids: int [B, N] for self-attention: tokens attend within their
      segment only; a negative id is padding and attends to nothing.
    scale: factor of the logits; D^-0.5 if None.
    impl: a name in `IMPLEMENTATIONS`, or 'auto' for the first that accepts.

  Returns:
    [B, N, H, D] in the type of q.

  Raises:
    ValueError: the implementation that was named refuses.
  """
  mask = _join(mask, segment_ids)
  spec = Spec(
    platform=jax.default_backend(),
    dtype=jnp.dtype(q.dtype).name,
    head_dim=q.shape[-1],
    masked=mask is not None,
  )
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  chosen, _ = resolve(spec, impl)
  return chosen.run(q, k, v, mask, scale)


def resolve(
  spec: Spec, impl: str = 'auto'
) -> tuple[Implementation, Mapping[str, str]]:
  """Choose the implementation of a call.

  Args:
    spec: the call.
    impl: a name, or 'auto'.

  Returns:
    The implementation and, by name, why those before it refused.

  Raises:
    ValueError: `impl` is unknown, or it refuses.
  """
  names = [i.name for i in IMPLEMENTATIONS]
  if impl != 'auto' and impl not in names:
    raise ValueError(
      f"expected attention impl 'auto' or one of {names}, found {impl!r}"
    )
  refusals = {}
  for candidate in IMPLEMENTATIONS:
    if impl not in ('auto', candidate.name):
      continue
    reason = candidate.refuse(spec)
    if reason is None:
      return candidate, refusals
    refusals[candidate.name] = reason
  raise ValueError(
    f'attention impl {impl!r} can not be used for {spec}: '
    + '; '.join(f'{n}: {r}' for n, r in refusals.items())
  )


def reference_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  mask: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  scale: float | None = None,
) -> jax.Array:
  """Compute attention in the plainest way: the oracle of every test."""
  mask = _join(mask, segment_ids)
  factor = q.shape[-1] ** -0.5 if scale is None else scale
  q, k, v, dtype = *(x.astype(jnp.float32) for x in (q, k, v)), q.dtype
  logits = factor * jnp.einsum('bnhd,bmhd->bhnm', q, k, precision='highest')
  mask = jnp.broadcast_to(True if mask is None else mask, logits.shape)
  top = jnp.max(logits, axis=-1, keepdims=True, where=mask, initial=-1e30)
  weight = jnp.where(mask, jnp.exp(jnp.where(mask, logits - top, 0.0)), 0.0)
  total = weight.sum(-1, keepdims=True)
  weight = weight / jnp.where(total > 0, total, 1.0)
  out = jnp.einsum('bhnm,bmhd->bnhd', weight, v, precision='highest')
  return out.astype(dtype)


def _join(mask, segment_ids):
  """Fold segment ids into the mask, bool broadcastable to [B, H, N, M]."""
  if segment_ids is None:
    return mask
  same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
  same &= segment_ids[:, None, :, None] >= 0
  return same if mask is None else same & mask


def _refuse_cudnn(spec: Spec) -> str | None:
  if spec.platform != 'gpu':
    return f'needs a GPU, found {spec.platform}'
  if spec.dtype not in ('bfloat16', 'float16'):
    return f'needs bfloat16 or float16, found {spec.dtype}'
  if spec.head_dim % 8:
    return f'needs a head_dim that 8 divides, found {spec.head_dim}'
  if spec.masked:
    return 'takes no mask'
  return None


def _run_cudnn(q, k, v, mask, scale):
  del mask  # refused
  return jax.nn.dot_product_attention(
    q, k, v, scale=scale, implementation='cudnn'
  )


def _refuse_saved(spec: Spec) -> str | None:
  if spec.platform != 'cpu':
    return f'is for the CPU, found {spec.platform}'
  if spec.dtype != 'float32':
    return f'needs float32, found {spec.dtype}'
  if spec.masked:
    return 'takes no mask'
  return None


def _run_saved(q, k, v, mask, scale):
  del mask  # refused
  q, k, v = (x.swapaxes(1, 2) for x in (q * scale, k, v))
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
  dlogits = weight * (_dot('bhnd,bhmd->bhnm', grad, v) - inner)
  dq = _dot('bhnm,bhmd->bhnd', dlogits, k)
  dk = _dot('bhnm,bhnd->bhmd', dlogits, q)
  return dq, dk, dv


_saved.defvjp(_saved_forward, _saved_backward)


def _run_xla(q, k, v, mask, scale):
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  logits = _dot('bhnd,bhmd->bhnm', q, k) * scale
  if mask is None:
    weight = jax.nn.softmax(logits, axis=-1)
  else:
    weight = jax.nn.softmax(jnp.where(mask, logits, -1e30), axis=-1)
    weight = jnp.where(mask, weight, 0.0)
  out = _dot('bhnm,bhmd->bhnd', weight.astype(v.dtype), v)
  return out.astype(q.dtype).swapaxes(1, 2)


def _dot(equation, a, b):
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


IMPLEMENTATIONS = (
  Implementation('cudnn', _refuse_cudnn, _run_cudnn),
  Implementation('xla_saved', _refuse_saved, _run_saved),
  Implementation('xla', lambda spec: None, _run_xla),
)
