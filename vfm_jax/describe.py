"""Say what a config would do, on any mesh, without allocating anything.

Shapes come from `jax.eval_shape`, layouts from `sharding.infer`, FLOPs from
the jaxpr of the step: a mesh of 256 devices is described on a laptop.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from vfm_jax import flops, sharding, trees

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Description:
  """Hold a description as text and as plain data.

  Attributes:
    text: tables to read.
    data: the same as dicts, lists and numbers, fit for JSON.
  """

  text: str
  data: dict[str, Any]


def describe(
  *,
  state: Any,
  batch: PyTree,
  mesh: sharding.AnyMesh,
  rules: Sequence[sharding.Rule] = sharding.RULES,
  rows: Sequence[Any] = (),
  teachers: PyTree | None = None,
  step_fn: Callable[..., Any] | None = None,
  device_bytes: int | None = None,
  title: str = '',
) -> Description:
  """Describe parameters, layout, memory and FLOPs of a training run.

  Args:
    state: abstract state with `params`, `opt_state`, `ema` and `extra`.
    batch: shape structs of the global batch.
    mesh: a mesh, or {axis: size} of one that is not here.
    rules: the sharding table.
    rows: how the optimizer treats each parameter (`optim.Row`).
    teachers: abstract weights that a step takes after the batch, which are
      neither trained nor saved; None or empty for none.
    step_fn: (state, batch[, teachers]) -> anything; its FLOPs are counted.
    device_bytes: memory of one device, to say whether the state fits.
    title: first line of the text.

  Raises:
    ShardingError: the layout does not fit; see `sharding.infer`.
  """
  shardings = sharding.infer(state, mesh, rules)
  sizes = _sizes(mesh)
  parameters = _parameters(state.params, shardings.params, rows)
  memory = bytes_a_device(state, shardings, batch, mesh)
  if teachers:
    optional = [dataclasses.replace(rule, optional=True) for rule in rules]
    places = sharding.infer(teachers, mesh, optional)
    memory['teachers'] = _total(teachers, places)
  data: dict[str, Any] = {
    'mesh': sizes,
    'devices': math.prod(sizes.values()),
    'parameters': parameters,
    'num_params': sum(p['count'] for p in parameters),
    'num_trainable': sum(p['count'] for p in parameters if not p['frozen']),
    'bytes_per_device': memory,
    'whole': dict(sharding.whole(state, shardings)),
  }
  if device_bytes is not None:
    data['fits'] = sum(memory.values()) <= device_bytes
  if step_fn is not None:
    given = (state, batch, teachers) if teachers else (state, batch)
    data['flops_per_step'] = flops.count(step_fn, *given)
  return Description('\n'.join(filter(None, [title, _text(data)])), data)


def _parameters(
  params: PyTree, shardings: PyTree, rows: Sequence[Any]
) -> list[dict[str, Any]]:
  treated = {row.path: row for row in rows}
  places = dict(trees.path_leaves(shardings))
  out = []
  for path, leaf in trees.path_leaves(params):
    row = treated.get(path)
    out.append(
      {
        'path': path,
        'shape': list(leaf.shape),
        'count': math.prod(leaf.shape),
        'dtype': str(leaf.dtype),
        'spec': _spec(places[path]),
        'group': row.group if row else '',
        'lr_scale': row.lr_scale if row else 1.0,
        'weight_decay': row.weight_decay if row else None,
        'frozen': bool(row and row.frozen),
      }
    )
  return out


def bytes_a_device(
  state: Any, shardings: Any, batch: PyTree, mesh: sharding.AnyMesh
) -> dict[str, int]:
  """Return bytes a device by category; activations are not among them.

  Raises:
    ShardingError: the batch does not divide over the mesh.
  """
  place = sharding.batch_sharding(mesh)
  for leaf in jax.tree.leaves(batch):
    sharding.check_batch(leaf.shape[0], mesh)
  return {
    'params': _total(state.params, shardings.params),
    'moments': _total(state.opt_state, shardings.opt_state),
    'ema': _total(state.ema, shardings.ema),
    'extra': _total(state.extra, shardings.extra),
    # One gradient for each parameter, in its type and layout.
    'gradients': _total(state.params, shardings.params),
    'batch': _total(batch, jax.tree.map(lambda _: place, batch)),
  }


def _total(tree: PyTree, places: PyTree) -> int:
  pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(places), strict=True)
  return sum(sharding.device_bytes(x, s) for x, s in pairs)


def _text(data: Mapping[str, Any]) -> str:
  """Lay the data out for reading."""
  head = ('path', 'shape', 'count', 'dtype', 'spec', 'lr x', 'decay')
  table = [
    (
      p['path'],
      'x'.join(map(str, p['shape'])) or '-',
      f'{p["count"]:,}',
      p['dtype'],
      p['spec'],
      'frozen' if p['frozen'] else _scale(p['lr_scale']),
      '-' if p['weight_decay'] is None else f'{p["weight_decay"]:g}',
    )
    for p in data['parameters']
  ]
  axes = ' '.join(f'{a}={n}' for a, n in data['mesh'].items())
  memory = data['bytes_per_device']
  lines = [
    grid([head, *table]),
    '',
    f'parameters        {data["num_params"]:,} '
    f'({data["num_trainable"]:,} trainable)',
    f'mesh              {axes} ({data["devices"]} devices)',
    'bytes a device, without activations:',
    *(f'  {k:<16}{readable(n):>12}' for k, n in memory.items()),
    f'  {"total":<16}{readable(sum(memory.values())):>12}',
  ]
  if 'fits' in data:
    lines.append(f'fits              {"yes" if data["fits"] else "NO"}')
  if data['whole']:
    lines.append('whole on every device, by config.rules:')
    lines += [f'  {readable(n):>12}  {p}' for p, n in data['whole'].items()]
  if 'flops_per_step' in data:
    n = data['flops_per_step']
    lines.append(
      f'FLOPs a step      {n:.4g} ({n / data["devices"]:.4g} a device)'
    )
  return '\n'.join(lines)


def grid(rows: Sequence[Sequence[str]]) -> str:
  """Return rows of cells as text, with columns of equal width."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return '\n'.join(
    '  '.join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
    for row in rows
  )


def _scale(scale: float | Sequence[float]) -> str:
  if isinstance(scale, Sequence):
    return f'{scale[0]:.4g}..{scale[-1]:.4g}'
  return f'{scale:.4g}'


def readable(n: float) -> str:
  """Return a number of bytes in the unit that suits it."""
  for unit in ('B', 'KiB', 'MiB', 'GiB'):
    if n < 1024 or unit == 'GiB':
      break
    n /= 1024
  return f'{n:.4g} {unit}'


def _spec(place: jax.sharding.NamedSharding) -> str:
  parts = ['+'.join(e) if isinstance(e, tuple) else e for e in place.spec]
  return ','.join(p or '.' for p in parts) or '-'


def _sizes(mesh: sharding.AnyMesh) -> dict[str, int]:
  return dict(mesh if isinstance(mesh, Mapping) else mesh.shape)
