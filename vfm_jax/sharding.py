"""Lay arrays out over a mesh: axes, one rule table, strict inference.

One table of (path pattern, spec) serves parameters, moments, averages and
teachers, for their paths end alike. Inference is arithmetic on shapes: it
needs no devices, so that the layout for 256 chips can be checked on a laptop.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax.linen import spmd
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from vfm_jax import fitting, slices, trees
from vfm_jax.fitting import Entry

PyTree = Any
AnyMesh = jax.sharding.Mesh | AbstractMesh | Mapping[str, int]

# Mesh axes that the batch is cut over: all but the two that cut activations.
BATCH = ('data', 'fsdp', 'expert')

# Logical names of activation axes, for `flax.linen.with_logical_constraint`.
ACTIVATIONS = (
  ('batch', BATCH),
  ('tokens', 'seq'),
  ('heads', 'tensor'),
  ('embed', None),
  ('hidden', 'tensor'),
  ('experts', 'expert'),
)

# Bytes of a leaf from which on it is worth a word that every device holds it.
LARGE = 2**20


class ShardingError(ValueError):
  """Say in one message why a layout does not fit the devices."""


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Give the number of devices along each axis; -1 takes what is left.

  Attributes:
    data: replicas of the whole state.
    fsdp: cuts parameters and the batch.
    tensor: cuts heads and hidden units.
    seq: cuts tokens.
    expert: cuts experts and the batch.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  seq: int = 1
  expert: int = 1

  def sizes(self, num_devices: int) -> dict[str, int]:
    """Return {axis: size} for a number of devices.

    Raises:
      ShardingError: the axes do not multiply to the number of devices.
    """
    sizes = dataclasses.asdict(self)
    free = [name for name, n in sizes.items() if n == -1]
    bad = [name for name, n in sizes.items() if n < 1 and n != -1]
    fixed = math.prod(n for n in sizes.values() if n != -1)
    if len(free) > 1 or bad:
      raise ShardingError(
        f'config.mesh={sizes}: expected sizes of at least 1 and -1 for one '
        f'axis at most; found {free if len(free) > 1 else bad}'
      )
    if num_devices % fixed or (not free and fixed != num_devices):
      raise ShardingError(
        f'config.mesh={sizes} needs '
        f'{"a multiple of " if free else ""}{fixed} devices; '
        f'found {num_devices}'
      )
    if free:
      sizes[free[0]] = num_devices // fixed
    return sizes


def make_mesh(
  cfg: Mesh,
  # To a checker, JAX's class of devices is a variable.
  devices: Sequence[jax.Device]  # pyright: ignore[reportInvalidTypeForm]
  | None = None,
) -> jax.sharding.Mesh:
  """Build the mesh over `devices`, all of them by default.

  Raises:
    ShardingError: the axes do not fit the devices.
    ValueError: nor do they fit the slices of a pod, see `slices.arrange`.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = cfg.sizes(len(devices))
  return jax.sharding.Mesh(
    slices.arrange(sizes, devices),
    tuple(sizes),
    axis_types=(AxisType.Auto,) * len(sizes),
  )


@dataclasses.dataclass(frozen=True)
class Rule:
  """Lay out the leaves whose path ends in a match of `pattern`.

  Attributes:
    pattern: regular expression; must match whole components of the path up to
      its end, so 'fc1/kernel' covers 'encoder/blocks/mlp/fc1/kernel' and the
      moments of it.
    spec: one entry (axis, tuple of axes or None) for each trailing axis of
      the leaf; see `fitting.fit` for what happens where one does not divide.
      Leading axes that it does not reach, as the depth of a scanned stack, are
      not cut.
    optional: the rule may stay unused.
  """

  pattern: str
  spec: tuple[Entry, ...] = ()
  optional: bool = False


# Matrices are cut over fsdp along their input and over tensor along heads or
# hidden units; whatever is small is kept whole. Every rule is optional, since
# the table serves all models; what none of them names is an error.
RULES = (
  Rule('qkv/kernel', ('fsdp', None, 'tensor', None), True),  # [D, 3, H, D/H]
  Rule('qkv/bias', (None, 'tensor', None), True),
  Rule('attn(_time)?/proj/kernel', ('tensor', 'fsdp'), True),
  Rule('attn/[qv]_bias', ('tensor',), True),
  Rule('mlp/fc1/kernel', ('fsdp', 'tensor'), True),
  Rule('mlp/fc1/bias', ('tensor',), True),
  Rule('mlp/fc2/kernel', ('tensor', 'fsdp'), True),
  Rule('experts/kernel', ('expert', 'fsdp', None), True),  # [E, D, D]
  Rule('experts/bias', ('expert', None), True),
  # Cut along their output: the pixels of a patch (2 * 14 * 14 * 3) and the
  # channels of a picture divide by fewer devices than a width does.
  Rule('(patch_embed|conv_in|stem)/kernel', (None, 'fsdp'), True),
  Rule('y_embed/table', (None, 'fsdp'), True),  # [classes + 1, D]
  Rule('([a-z]+_)*depthwise/kernel', (), True),  # [K, K, C]
  # The last resort: any other matrix is cut along its input; biases, scales,
  # tokens and position tables are kept whole.
  Rule('kernel', ('fsdp', None), True),
  Rule('([a-z]+_)*(bias|scale|gamma(_[0-9]+)?)', (), True),
  Rule('([a-z]+_)*(tokens?|pos_embed)', (), True),
  Rule('norm/(mean|var)', (), True),  # of a frozen convolutional network
  # What a combiner of tasks, a way to draw times and an auxiliary loss keep.
  Rule('(combine|times|auxiliary)/[a-z_]+', (), True),
  # Low-rank updates are small, and rarely divide.
  Rule('lora/.+/[ab]', (), True),
  Rule('rng', (), True),
)


def spread(
  rules: tuple[Rule, ...] = RULES, over: tuple[str, ...] = ('data',)
) -> tuple[Rule, ...]:
  """Cut what is cut over fsdp over further axes too, where they divide.

  For widths that not all devices divide: 1,152 goes over 256 devices as
  fsdp=128 and data=2, and what is wider or has a second axis is cut 256 ways.
  In a recipe `config.rules = ref(sharding.spread)`.

  Args:
    rules: the table.
    over: storage axes, see `fitting.STORAGE`: 'data', or 'seq' where tokens are
      cut.
  """

  def wider(entry: Entry) -> Entry:
    names = (entry,) if isinstance(entry, str) else entry or ()
    return (*names, *over) if 'fsdp' in names else entry

  return tuple(
    dataclasses.replace(rule, spec=tuple(wider(e) for e in rule.spec))
    for rule in rules
  )


def infer(tree: PyTree, mesh: AnyMesh, rules: Sequence[Rule] = RULES) -> PyTree:
  """Return the NamedSharding of each leaf.

  Args:
    tree: arrays or shape structs, best the whole state at once, so that a
      rule counts as used wherever it is.
    mesh: a mesh, or {axis: size} for devices that are not here; axes that
      are not named have size 1.
    rules: the first that matches a leaf decides. Axes of size 1 count as
      nothing; scalars are replicated without a rule.

  Raises:
    ShardingError: one message with every leaf without a rule, every rule that
      is unused and not optional, every unknown axis and every leaf that an
      axis can not cut: nothing is kept whole that a rule cuts.
  """
  built = _as_mesh(mesh)
  sizes = dict(built.shape)
  errors: list[str] = []
  ways: set[int] = set()
  used: set[int] = set()
  compiled = [re.compile(rf'(?:^|/)(?:{r.pattern})$') for r in rules]

  def place(path: str, leaf: Any) -> NamedSharding:
    if not leaf.shape:
      return NamedSharding(built, PartitionSpec())
    for i, pattern in enumerate(compiled):
      if pattern.search(path):
        used.add(i)
        found = fitting.fit(rules[i].spec, leaf.shape, sizes)
        errors.extend(
          f'{path} {list(leaf.shape)} by {rules[i].pattern!r}: {p}'
          for p in found.problems
        )
        ways.update([found.ways] if found.ways else [])
        return NamedSharding(built, found.spec)
    errors.append(f'{path} {list(leaf.shape)}: no rule matches')
    return NamedSharding(built, PartitionSpec())

  shardings = trees.map_with_path(place, tree)
  errors += [
    f'{r.pattern!r}: matches no leaf and is not optional'
    for i, r in enumerate(rules)
    if i not in used and not r.optional
  ]
  if ways:
    errors.append(
      f'config.mesh.fsdp={math.gcd(*ways)}, with more of config.mesh.data, '
      'cuts these leaves; config.rules=ref(sharding.spread) then cuts them '
      'over data too, where it divides'
    )
  if errors:
    raise ShardingError(
      f'config.rules do not fit the state on the mesh {sizes}:\n  '
      + '\n  '.join(errors)
    )
  return shardings


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
  """Return the sharding that cuts axis 0 over the batch axes of the mesh."""
  built = _as_mesh(mesh)
  axes = tuple(a for a in BATCH if built.shape.get(a, 1) > 1)
  return NamedSharding(built, PartitionSpec(axes or None))


def replicated(mesh: AnyMesh) -> NamedSharding:
  """Return the sharding that keeps an array whole on every device."""
  return NamedSharding(_as_mesh(mesh), PartitionSpec())


def put_batch(batch: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
  """Assemble global device arrays from the rows that this process loaded.

  Args:
    batch: tree of NumPy arrays [B / count, ...]; see `process_slot`.
    mesh: the mesh of the run.

  Raises:
    ShardingError: the batch does not divide over the batch axes of the mesh.
  """
  _, count = process_slot(mesh)
  place = batch_sharding(mesh)

  def put(x: Any) -> jax.Array:
    rows = x.shape[0] * count
    check_batch(rows, mesh)
    return jax.make_array_from_process_local_data(
      place, x, (rows, *x.shape[1:])
    )

  return jax.tree.map(put, batch)


def check_batch(rows: int, mesh: AnyMesh) -> None:
  """Raise a ShardingError if a global batch does not divide over the mesh."""
  sizes = dict(_as_mesh(mesh).shape)
  parts = math.prod(sizes.get(a, 1) for a in BATCH)
  if rows % parts:
    raise ShardingError(
      f'config.batch_size={rows} does not divide over the batch axes '
      f'{BATCH} of config.mesh={sizes}: expected a multiple of {parts}'
    )


def process_slot(mesh: jax.sharding.Mesh | None) -> tuple[int, int]:
  """Return (index, count): which part of each batch this process loads.

  It is (process_index, process_count) unless the tensor or seq axis reaches
  over processes, which then load the same rows; without a mesh it is all.

  Raises:
    ShardingError: the rows of two processes overlap in part.
  """
  if mesh is None:
    return 0, 1
  parts = math.prod(mesh.shape.get(a, 1) for a in BATCH)
  held: dict[int, set[int]] = {}
  where = batch_sharding(mesh).devices_indices_map((parts,))
  for device, (rows,) in where.items():
    held.setdefault(device.process_index, set()).add(rows.start or 0)
  slots = sorted({tuple(sorted(rows)) for rows in held.values()})
  if sum(map(len, slots)) != parts or len({len(s) for s in slots}) != 1:
    raise ShardingError(
      f'config.mesh={dict(mesh.shape)}: processes hold batch parts {slots} '
      'that overlap or differ in size; let tensor * seq divide the devices of '
      'a process or be a multiple of them'
    )
  return slots.index(tuple(sorted(held[jax.process_index()]))), len(slots)


@contextlib.contextmanager
def activations(mesh: jax.sharding.Mesh | AbstractMesh) -> Iterator[None]:
  """Give the logical names of activations a meaning while tracing.

  Models name axes with `constrain`, which is the identity outside of this
  context. An abstract mesh is for tracing only: constants that are computed
  meanwhile stay off the devices of the mesh, which may not be here.
  """
  rules = [(name, _present(axes, mesh.shape)) for name, axes in ACTIVATIONS]
  if isinstance(mesh, AbstractMesh):
    scope = jax.sharding.use_abstract_mesh(mesh)
  else:
    scope = jax.set_mesh(mesh)
  with scope, nn.logical_axis_rules(rules):
    yield


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Constrain the layout of `x` by the logical name of each axis.

  A batch that the devices do not divide, as the single example that parameters
  are initialised with, is left to the compiler, for `put_batch` refuses it
  where it comes in; so is an axis of length 1.

  Raises:
    ShardingError: another axis does not divide, or names are not one an axis.
  """
  if len(names) != x.ndim:
    raise ShardingError(f'{len(names)} names {names} for an array of {x.shape}')
  rules: dict[Any, Any] = dict(nn.get_logical_axis_rules())
  if not any(rules.get(name) for name in names):
    return x
  sizes = jax.sharding.get_abstract_mesh().shape
  layout: list[Any] = list(names)
  for i, (name, length) in enumerate(zip(names, x.shape, strict=True)):
    axes = rules.get(name) or ()
    parts = math.prod(sizes[a] for a in axes)
    if length % parts == 0:
      continue
    if name != 'batch' and length > 1:
      raise ShardingError(
        f'config.mesh.{"*".join(axes)}={parts} does not divide the {length} '
        f'{name} of an activation {list(x.shape)}'
      )
    layout[i] = PartitionSpec.UNCONSTRAINED
  return spmd.with_logical_constraint(x, tuple(layout))


def device_bytes(leaf: Any, sharding: NamedSharding) -> int:
  """Return the bytes that one leaf takes on one device."""
  return trees.nbytes(sharding.shard_shape(tuple(leaf.shape)), leaf.dtype)


def whole(tree: PyTree, shardings: PyTree) -> list[tuple[str, int]]:
  """Return (path, bytes) of the large leaves that every device holds whole.

  Empty where none at all is cut, as with replicas alone.
  """
  leaves = list(
    zip(trees.path_leaves(tree), jax.tree.leaves(shardings), strict=True)
  )
  if all(s.is_fully_replicated for _, s in leaves):
    return []
  sized = [(path, device_bytes(x, s), s) for (path, x), s in leaves]
  return [
    (path, n) for path, n, s in sized if n >= LARGE and s.is_fully_replicated
  ]


def report(tree: PyTree, shardings: PyTree) -> str:
  """Return a table: path, shape, spec, bytes a device, and their total."""
  lines, total = [], 0
  leaves = zip(trees.path_leaves(tree), jax.tree.leaves(shardings), strict=True)
  for (path, leaf), sharding in leaves:
    n = device_bytes(leaf, sharding)
    total += n
    shape = 'x'.join(map(str, leaf.shape)) or '-'
    spec = ','.join(map(str, sharding.spec)) or '-'
    lines.append(f'{path:<60} {shape:>20} {spec:>24} {n:>14,}')
  head = f'{"path":<60} {"shape":>20} {"spec":>24} {"bytes/device":>14}'
  return '\n'.join([head, *lines, f'{"total":<106} {total:>14,}'])


def _present(axes: Entry, sizes: Mapping[str, int]) -> Entry:
  names = (axes,) if isinstance(axes, str) else axes or ()
  return tuple(n for n in names if sizes.get(n, 1) > 1) or None


def _as_mesh(mesh: AnyMesh) -> jax.sharding.Mesh | AbstractMesh:
  if isinstance(mesh, Mapping):
    sizes = {f.name: 1 for f in dataclasses.fields(Mesh)} | dict(mesh)
    return AbstractMesh(
      tuple(sizes.values()),
      tuple(sizes),
      axis_types=(AxisType.Auto,) * len(sizes),
    )
  return mesh
