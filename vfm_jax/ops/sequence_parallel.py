"""Attend where the mesh axis `seq` cuts the tokens.

Two ways. Gathered: every device fetches all keys and values and runs its own
rows through the best kernel there is; the backward pass fetches them again.
Ring: see `ops.ring`. Both receive each foreign key and value once a pass, but
the ring sends float32 gradients too and cannot use a kernel, and the gathered
way holds the keys and values of all tokens: it is taken while they fit.
"""

import math
from collections.abc import Callable
from typing import Literal

import jax
from jax.sharding import PartitionSpec

from vfm_jax import sharding
from vfm_jax.ops import ring

Way = Literal['auto', 'ring', 'gathered']
AXIS = 'seq'

# Bytes that the gathered keys and values of one layer may take on a device.
# Chosen, not measured: a thirty-second of the memory of a TPU v5e.
ROOM = 2**29


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  segment_ids: jax.Array | None = None,
  scale: float | None = None,
  logit_cap: float | None = None,
  inner: Callable[..., jax.Array] | None = None,
  way: Way = 'auto',
) -> jax.Array:
  """Return attention [B, N, H, D], cut as q is; arrays are global.

  Call it under a mesh, as `sharding.activations` sets one; where nothing cuts
  tokens it is attention in XLA.

  Args:
    q: [B, N, H, D].
    k: [B, M, Hkv, D]; Hkv divides H.
    v: [B, M, Hkv, D].
    segment_ids: int32 [B, N] for self-attention: tokens attend within their
      segment only; a negative id is padding and attends to nothing.
    scale: factor of the logits; D^-0.5 if None.
    logit_cap: c in c tanh(logit / c); None for no cap.
    inner: what one device attends with in the gathered way, without segment
      ids: function of local q [b, n, h, D], k and v [b, M, hkv, D] and the
      keywords segment_ids (None), scale and logit_cap. None is XLA.
    way: 'auto' chooses by `choose`.

  Raises:
    ShardingError: tokens or heads do not divide over the mesh.
  """
  mesh = jax.sharding.get_abstract_mesh()
  sizes = {a: n for a, n in mesh.shape.items() if a not in mesh.manual_axes}
  parts, tensor = sizes.get(AXIS, 1), sizes.get('tensor', 1)
  _check(q, k, parts, tensor)
  batch = tuple(a for a in sharding.BATCH if sizes.get(a, 1) > 1)
  slots = math.prod(sizes[a] for a in batch)
  if q.shape[0] % slots:  # one example, for the shapes of parameters
    batch, slots = (), 1
  factor = q.shape[-1] ** -0.5 if scale is None else scale
  if way == 'auto':
    held = math.prod(k.shape) // (slots * tensor)
    way = choose(2 * held * k.dtype.itemsize)
  here = ring.How(AXIS, 1, factor, logit_cap)

  def gathered(q, k, v, ids):
    k, v = (_gather(x, parts) for x in (k, v))
    if inner is not None and ids is None:
      return inner(q, k, v, segment_ids=None, scale=factor, logit_cap=logit_cap)
    return ring.attend(
      here, q, k, v, ids, None if ids is None else _gather(ids, parts)
    )

  def round_trip(q, k, v, ids):
    return ring.attend(here._replace(parts=parts), q, k, v, ids, ids)

  if way == 'gathered':
    local = jax.checkpoint(gathered, policy=_save)
  elif way == 'ring':
    local = round_trip
  else:
    raise ValueError(
      f"expected `way` 'auto', 'ring' or 'gathered', found {way!r}"
    )
  cut = PartitionSpec(
    batch or None,
    AXIS if parts > 1 else None,
    'tensor' if tensor > 1 else None,
  )
  rows = None if segment_ids is None else PartitionSpec(*cut[:2])
  if not sizes:
    return local(q, k, v, segment_ids)
  return jax.shard_map(
    local,
    in_specs=(cut, cut, cut, rows),
    out_specs=cut,
    axis_names=set(sizes),
    # A kernel does not say which of its outputs differ between devices.
    check_vma=False,
  )(q, k, v, segment_ids)


def refuse(queries: int, keys: int, masked: bool, parts: int) -> str:
  """Say why `attend` does not serve a call over `parts` devices; '' if it does.

  Args:
    queries: their number N.
    keys: their number M.
    masked: whether a mask is given.
    parts: devices along `seq`.
  """
  if masked:
    return f'a mask where config.mesh.{AXIS}={parts} cuts tokens'
  for what, count in (('queries', queries), ('keys', keys)):
    if count % parts:
      return f'config.mesh.{AXIS}={parts} does not divide {count} {what}'
  return ''


def choose(gathered: int) -> Literal['ring', 'gathered']:
  """Return the cheaper way for the bytes of gathered keys and values.

  A device receives (1 - 1/parts) of these bytes forward in either way;
  backward too, and as much again for the gradients, which are float32 in the
  ring and of the type of the keys in the gathered way. So the ring never sends
  less, and is for what does not fit in `ROOM`.
  """
  return 'gathered' if gathered <= ROOM else 'ring'


# What only moves numbers, keys and values of all tokens above all, is done once
# more in the backward pass; it is far larger than what the device computes.
_MOVES = frozenset(
  (
    'all_gather',
    'broadcast_in_dim',
    'convert_element_type',
    'pad',
    'reshape',
    'squeeze',
    'transpose',
  )
)


def _save(primitive, *_, **__) -> bool:
  """Say whether the backward pass finds the result of a primitive saved."""
  return primitive.name not in _MOVES


def _gather(x: jax.Array, parts: int) -> jax.Array:
  if parts == 1:
    return x
  return jax.lax.all_gather(x, AXIS, axis=1, tiled=True)


def _check(q, k, parts, tensor):
  if reason := refuse(q.shape[1], k.shape[1], False, parts):
    raise sharding.ShardingError(reason)
  for what, count in (('heads', q.shape[2]), ('heads of keys', k.shape[2])):
    if count % tensor:
      raise sharding.ShardingError(
        f'config.mesh.tensor={tensor} does not divide {count} {what}'
      )
