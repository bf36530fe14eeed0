"""Name the ways to spread a run over devices, as values for `config.mesh`.

In a recipe `mesh=ref(presets.fsdp)`; on the command line, in place of what the
recipe says, `--config.mesh="{'_ref': 'vfm_jax.presets:fsdp'}"`, with arguments
as further keys. Over several TPU slices `data` is what goes over the slower
network between them, see `slices.arrange`: give each slice a replica by
`replicas`. Widths that the ways do not divide: see `sharding.spread`.
"""

from vfm_jax.sharding import Mesh, ShardingError


def dp() -> Mesh:
  """Replicate the state on every device, and cut the batch."""
  return Mesh()


def fsdp(ways: int = -1, replicas: int | None = None) -> Mesh:
  """Cut state and batch.

  Args:
    ways: devices that share one copy of the state.
    replicas: number of copies; by default as many as the devices make, 1 where
      `ways` is -1, for all devices.
  """
  return _with_fsdp(ways, replicas)


def fsdp_tensor(
  tensor: int = 2, ways: int = -1, replicas: int | None = None
) -> Mesh:
  """Cut state and batch, and heads and hidden units over `tensor` devices."""
  _above_one('tensor', tensor)
  return _with_fsdp(ways, replicas, tensor=tensor)


def sequence(seq: int = 2, ways: int = -1, replicas: int | None = None) -> Mesh:
  """Cut state and batch, and the tokens of long videos over `seq` devices."""
  _above_one('seq', seq)
  return _with_fsdp(ways, replicas, seq=seq)


def experts(
  expert: int = 2, ways: int = -1, replicas: int | None = None
) -> Mesh:
  """Cut state and batch, and mixtures over `expert` devices, which divide E."""
  _above_one('expert', expert)
  return _with_fsdp(ways, replicas, expert=expert)


def _with_fsdp(ways: int, replicas: int | None, **axes: int) -> Mesh:
  if replicas is None:
    replicas = 1 if ways == -1 else -1
  return Mesh(data=replicas, fsdp=ways, **axes)


def _above_one(name: str, size: int) -> None:
  if size < 2:
    raise ShardingError(
      f'config.mesh.{name}: expected at least 2 devices to cut over, found '
      f'{size}; for fewer take the preset `fsdp`'
    )
