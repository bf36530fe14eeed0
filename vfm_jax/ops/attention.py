"""Compute attention through the best implementation that accepts the case.

An ordered list of implementations, each of which may refuse with a reason. To
add one, put an `Implementation` in `IMPLEMENTATIONS`: first means preferred.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vfm_jax.ops import (
  attention_measured,
  attention_mesh,
  attention_table,
  attention_xla,
  flash_gpu,
  flash_tpu,
  sequence_parallel,
)
from vfm_jax.ops.attention_spec import Spec


@dataclasses.dataclass(frozen=True)
class Implementation:
  """Name a way to compute attention, and say when it can not be used.

  Attributes:
    name: value for `impl`.
    refuse: returns the reason not to be used for a `Spec`, or None.
    run: function (q, k, v, *, mask, segment_ids, scale, logit_cap) ->
      [B, N, H, D]; without `mask` for a kernel.
    kernel: whether it is opaque to XLA's partitioner, has no mask, and gets
      the part of one device.
    defer: returns the reason for 'auto' to pass it over, though it could run.
  """

  name: str
  refuse: Callable[[Spec], str | None]
  run: Callable[..., jax.Array]
  kernel: bool = False
  defer: Callable[[Spec], str | None] = lambda spec: None


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  mask: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  scale: float | None = None,
  logit_cap: float | None = None,
  impl: str = 'auto',
) -> jax.Array:
  """Return softmax(scale q k^T) v over the heads.

  Softmax and accumulation are float32. A query that may attend to nothing
  gives 0. Under a mesh (`jax.set_mesh`) a kernel runs on each device's part
  of batch and heads; tokens that are cut over `seq` attend to those of the
  other devices, see `ops.sequence_parallel`.

  Args:
    q: [B, N, H, D].
    k: [B, M, Hkv, D]; each of its heads serves H / Hkv heads of q.
    v: [B, M, Hkv, D].
    mask: bool, broadcastable to [B, H, N, M]; True = may attend, as in
      `jax.nn.dot_product_attention`.
    segment_ids: int [B, N] for self-attention: tokens attend within their
      segment only; a negative id is padding and attends to nothing.
    scale: factor of the logits; D^-0.5 if None.
    logit_cap: c in c tanh(logits / c), which keeps the logits within -c and c
      (Gemma 2); None for no cap.
    impl: a name in `IMPLEMENTATIONS`, or 'auto' for the first that accepts.

  Returns:
    [B, N, H, D] in the type of q.

  Raises:
    ValueError: the implementation that was named refuses, or shapes do not
      go together.
  """
  _check(q, k, v, segment_ids, logit_cap)
  where = attention_mesh.cut()
  spec = _spec(q, k, mask, segment_ids, logit_cap, where)
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  chosen, refusals = resolve(spec, impl)
  attention_table.record(spec, impl, chosen.name, refusals)
  options: dict[str, Any] = dict(scale=scale, logit_cap=logit_cap)
  if where.seq > 1 and spec.queries < q.shape[1]:
    return sequence_parallel.attend(
      q, k, v, segment_ids=segment_ids, inner=chosen.run, **options
    )
  if not chosen.kernel:
    return chosen.run(q, k, v, mask=mask, segment_ids=segment_ids, **options)

  def run(q, k, v, segment_ids):
    return chosen.run(q, k, v, segment_ids=segment_ids, **options)

  return attention_mesh.over_mesh(run, where, q, k, v, segment_ids)


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
    reason = _refuse(candidate, spec)
    if reason is None and impl == 'auto':
      reason = candidate.defer(spec)
    if reason is None:
      return candidate, refusals
    refusals[candidate.name] = reason
  raise ValueError(
    f'attention impl {impl!r} can not be used for {spec}: '
    + '; '.join(f'{n}: {r}' for n, r in refusals.items())
  )


def _refuse(candidate: Implementation, spec: Spec) -> str | None:
  if candidate.kernel and spec.masked:
    return 'takes no mask'
  if candidate.kernel and spec.undivided:
    return spec.undivided
  return candidate.refuse(spec)


def _check(q, k, v, segment_ids, logit_cap) -> None:
  if k.shape != v.shape or q.shape[2] % k.shape[2]:
    raise ValueError(
      'attention: expected k and v of one shape [B, M, Hkv, D], with a number '
      f'of heads that divides the {q.shape[2]} of q {q.shape}; found '
      f'{k.shape} and {v.shape}'
    )
  if segment_ids is not None and (
    segment_ids.shape != q.shape[:2] or k.shape[1] != q.shape[1]
  ):
    raise ValueError(
      'attention: segment ids are for self-attention: expected them to be '
      f'{q.shape[:2]} and as many keys; found {segment_ids.shape} and '
      f'{k.shape[1]} keys'
    )
  if logit_cap is not None and logit_cap <= 0:
    raise ValueError(f'expected a logit_cap above 0, found {logit_cap}')


def _spec(q, k, mask, segment_ids, logit_cap, where) -> Spec:
  """Describe what one device computes, or all if it can not be cut."""
  (b, n, heads, dim), m, kv_heads = q.shape, k.shape[1], k.shape[2]
  undivided = where.undivided(b, heads, kv_heads)
  if where.seq > 1 and not undivided:
    undivided = sequence_parallel.refuse(n, m, mask is not None, where.seq)
  if not undivided:
    b, n = b // where.batch_parts, n // where.seq
    heads, kv_heads = heads // where.tensor, kv_heads // where.tensor
    if where.seq > 1 and segment_ids is not None:
      undivided = 'segment ids of tokens that are cut over seq go to XLA'
  device = attention_mesh.device()
  return Spec(
    platform=device.platform,
    dtype=jnp.dtype(q.dtype).name,
    head_dim=dim,
    batch=b,
    queries=n,
    keys=m,
    heads=heads,
    kv_heads=kv_heads,
    masked=mask is not None,
    segments=segment_ids is not None,
    logit_cap=logit_cap is not None,
    device_kind=device.kind,
    capability=device.capability,
    jax=jax.__version_info__,
    undivided=undivided,
  )


def _refuse_cudnn(spec: Spec) -> str | None:
  if spec.platform != 'gpu':
    return f'needs a GPU, found {spec.platform}'
  if spec.dtype not in ('bfloat16', 'float16'):
    return f'needs bfloat16 or float16, found {spec.dtype}'
  if spec.head_dim % 8:
    return f'needs a head_dim that 8 divides, found {spec.head_dim}'
  if spec.masked or spec.segments:
    return 'takes no mask and no segment ids'
  if spec.logit_cap:
    return 'takes no logit cap'
  return None


def _run_cudnn(
  q, k, v, *, mask=None, segment_ids=None, scale, logit_cap=None
):  # fmt: skip
  del mask, segment_ids, logit_cap  # refused
  return jax.nn.dot_product_attention(
    q, k, v, scale=scale, implementation='cudnn'
  )


IMPLEMENTATIONS = (
  Implementation('pallas_tpu', flash_tpu.refuse, flash_tpu.attend, True),
  Implementation(
    'pallas_gpu',
    flash_gpu.refuse,
    flash_gpu.attend,
    True,
    functools.partial(attention_measured.defer, rows=attention_measured.ROWS),
  ),
  Implementation('cudnn', _refuse_cudnn, _run_cudnn),
  Implementation(
    'xla_saved', attention_xla.refuse_saved, attention_xla.attend_saved
  ),
  Implementation('xla', lambda spec: None, attention_xla.attend),
)
