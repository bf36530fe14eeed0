"""Cut a call of attention over the mesh in scope, for kernels of one device.

XLA partitions what it compiles itself; a kernel it cannot look into. The batch
goes over the batch axes of the mesh and the heads over `tensor`, each device
runs the kernel on its part, and nothing is communicated.
"""

import dataclasses
import math
import re
from collections.abc import Callable

import jax
from jax.sharding import AbstractMesh, PartitionSpec

from vfm_jax import sharding

# Of devices that are not here: a topology that is only compiled for.
_HOPPER = re.compile(r'\b(H100|H200|H800|H20|GH200)\b')


@dataclasses.dataclass(frozen=True)
class Device:
  """Say what runs a call: see the fields of the same names in `Spec`."""

  platform: str
  kind: str = ''
  capability: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Cut:
  """Say how the mesh in scope cuts a call.

  Attributes:
    mesh: the mesh; None for none, or for one whose axes are all cut already.
    batch: axes that cut the batch.
    batch_parts: into how many parts.
    tensor: number of parts that heads are cut into.
    seq: number of parts that tokens are cut into.
  """

  mesh: AbstractMesh | None = None
  batch: tuple[str, ...] = ()
  batch_parts: int = 1
  tensor: int = 1
  seq: int = 1

  def undivided(self, batch: int, heads: int, kv_heads: int) -> str:
    """Say why a call can not be cut; '' if it can."""
    if batch % self.batch_parts:
      axes = ' * '.join(self.batch)
      return (
        f'a batch of {batch} does not divide over {axes} = {self.batch_parts}'
      )
    for what, count in (('heads', heads), ('heads of keys', kv_heads)):
      if count % self.tensor:
        return f'{count} {what} do not divide over tensor = {self.tensor}'
    return ''


def device() -> Device:
  """Return the device of the mesh in scope, or JAX's default.

  A mesh of a topology that is only compiled for counts: its devices are not
  here.
  """
  mesh = jax.sharding.get_abstract_mesh()
  target = None if mesh.empty else mesh.abstract_device
  if target is None:
    local = jax.devices()[0]
    version = getattr(local, 'compute_capability', None)
    major, _, minor = (version or '').partition('.')
    capability = (int(major), int(minor or 0)) if version else None
    return Device(jax.default_backend(), local.device_kind, capability)
  platform = str(target.platform)
  platform = {'cuda': 'gpu', 'rocm': 'gpu'}.get(platform, platform)
  hopper = platform == 'gpu' and _HOPPER.search(target.device_kind)
  return Device(platform, target.device_kind, (9, 0) if hopper else None)


def cut() -> Cut:
  """Return how the mesh in scope cuts what is not cut yet."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return Cut()
  sizes = {a: n for a, n in mesh.shape.items() if a not in mesh.manual_axes}
  if math.prod(sizes.values()) == 1:
    return Cut()
  batch = tuple(a for a in sharding.BATCH if sizes.get(a, 1) > 1)
  return Cut(
    mesh,
    batch,
    math.prod(sizes[a] for a in batch),
    sizes.get('tensor', 1),
    sizes.get('seq', 1),
  )


def over_mesh(
  attend: Callable[..., jax.Array],
  where: Cut,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segment_ids: jax.Array | None,
) -> jax.Array:
  """Run a kernel on each device's part of batch and heads.

  Args:
    attend: (q, k, v, segment_ids) -> [B, N, H, D] of one device.
    where: how to cut.
    q: [B, N, H, D].
    k: [B, M, Hkv, D].
    v: [B, M, Hkv, D].
    segment_ids: int [B, N] or None.
  """
  if where.mesh is None:
    return attend(q, k, v, segment_ids)
  batch = where.batch or None
  tensor = 'tensor' if where.tensor > 1 else None
  part = PartitionSpec(batch, None, tensor)
  ids = None if segment_ids is None else PartitionSpec(batch)
  manual = set(where.mesh.axis_names) - set(where.mesh.manual_axes)
  return jax.shard_map(
    attend,
    in_specs=(part, part, part, ids),
    out_specs=part,
    axis_names=manual,
    # A kernel does not say which of its outputs differ between devices.
    check_vma=False,
  )(q, k, v, segment_ids)
