"""Lay out for reading what `ahead.analyse` found."""

from collections.abc import Mapping
from typing import Any

from vfm_jax.describe import grid, readable


def text(data: Mapping[str, Any]) -> str:
  """Return the report of a compiled step.

  Args:
    data: from `ahead.analyse`.
  """
  axes = ' '.join(f'{a}={n}' for a, n in data['mesh'].items())
  rows = data['batch_size'] // data['accum']
  lines = [
    f'target            {data["target"]}: {data["devices"]} x {data["kind"]}, '
    f'jax {data["jax"]}',
    f'mesh              {axes}',
    f'batch             {data["batch_size"]:,} in {data["accum"]} parts '
    f'({rows / data["devices"]:g} a device at a time), '
    f'remat {"/".join(data["remat"]) or "none"}',
    f'compiled in       {data["compile_s"]:.0f} s on this machine',
    '',
    'bytes a device',
    *(_row(name, readable(n)) for name, n in data['layout'].items()),
  ]
  if 'temporaries' in data:
    made = 'activations, gradients and copies'
    lines += [
      _row('in a step', f'{readable(data["temporaries"])}  {made}'),
      _row('program', readable(data['code'])),
    ]
  need, have = readable(data['need']), readable(data['have'])
  if data['fits']:
    lines.append(_row('peak', f'{need} of {have}: fits'))
  else:
    lines.append(_row('peak', f'does not fit: needs {need} of {have}'))
  work = data['model_flops']
  lines += [
    '',
    f'model FLOPs       {work:.4g} a step, {work / data["devices"]:.4g} a '
    'device, without what remat repeats',
  ]
  if 'collectives' in data:
    lines += ['', *_collectives(data)]
  if 'step_s' in data:
    lines += ['', *_estimate(data)]
  elif data.get('kernels'):
    lines += ['', f'kernels           {_kernels(data["kernels"])}']
  return '\n'.join([*lines, '', *_levers(data)])


def _row(name: str, value: str) -> str:
  return f'  {name:<16}{value}'


def _collectives(data: Mapping[str, Any]) -> list[str]:
  rows = [
    (kind, f'{c["count"]:,}', f'{c["runs"]:,}', readable(c['bytes']))
    for kind, c in data['collectives'].items()
  ]
  lines = ['collectives of a step, on one device']
  head = ('', 'in the program', 'runs', 'bytes')
  table = grid([head, *rows]) if rows else 'none'
  lines += [f'  {line}' for line in table.splitlines()]
  others = data['other_gathers']
  nbytes = readable(sum(o['bytes'] for o in others))
  lines.append(
    f'  all-gathers of anything but parameters: {len(others)}, {nbytes}'
  )
  lines += [
    f'    {o["runs"]} x {", ".join(o["shape"])}  {o["of"]}' for o in others[:5]
  ]
  return lines


def _estimate(data: Mapping[str, Any]) -> list[str]:
  ghz = data['clock_hz'] / 1e9
  lines = [
    f"ESTIMATE, from the compiler's cycles at {ghz:g} GHz; it knows no "
    'collectives and no waiting for memory',
    _row('step', f'{1000 * data["step_s"]:.1f} ms'),
    _row(
      'MFU',
      f'{data["mfu"]:.1%} of {data["peak_flops"] / 1e12:g} TFLOP/s a device',
    ),
  ]
  if data['kernels']:
    lines.append(_row('kernels', _kernels(data['kernels'])))
  lines.append('  the dearest operations:')
  lines += [f'    {share:6.1%}  {op}' for op, share in data['dearest'].items()]
  return lines


def _kernels(kernels: Mapping[str, Any]) -> str:
  return ', '.join(
    f'{name} x {k["runs"]}{"" if k["counted"] else " (NOT COUNTED)"}'
    for name, k in kernels.items()
  )


def _levers(data: Mapping[str, Any]) -> list[str]:
  lines = ['what else would save, in bytes a device']
  for name, lever in data['levers'].items():
    saves = lever['saves']
    value = f'{"-" if saves < 0 else ""}{readable(abs(saves))}'
    if lever['compiled']:
      note = f'peak {readable(lever["need"])}'
      if not lever['fits']:
        note += ', does not fit'
      if lever['step_s']:
        note += f', estimated step {1000 * lever["step_s"]:.1f} ms'
      value += f'  compiled: {note}'
    else:
      value += '  of the state, by arithmetic'
    lines.append(f'  {name:<26}{value}')
  if not any(lever['compiled'] for lever in data['levers'].values()):
    lines.append(
      '  remat and accumulation: add --levers, which compiles for each'
    )
  return lines
