"""Run one recipe over several seeds and set its metrics side by side."""

import json
import pathlib
import statistics
import time
from collections.abc import Sequence

from vfm_jax import config as config_lib
from vfm_jax import train


def study(
  config: config_lib.ConfigDict, workdir: str, seeds: Sequence[int]
) -> str:
  """Train once a seed in `workdir/seed_N`; return and write the table.

  A seed that is finished is not run again. The table has, for each metric,
  its first value (the initial parameters, where the recipe evaluates them)
  and its last, as mean ± sample standard deviation over the seeds.

  Args:
    config: the recipe; its seed is replaced.
    workdir: where the runs, `study.md` and `study.json` go.
    seeds: the seeds, at least one.
  """
  started = time.monotonic()
  runs = []
  for seed in seeds:
    one = config.copy_and_resolve_references()
    one.seed = seed
    one.lock()
    exp = config_lib.build(one)
    print(f'--- seed {seed} ---', flush=True)
    runs.append(train.train(exp, f'{workdir}/seed_{seed}', config=one))
  table = _table(runs, seeds) + (
    f'\n{len(seeds)} seeds, {(time.monotonic() - started) / 60:.1f} minutes; '
    f'curves and pictures are in {workdir}/seed_*.\n'
  )
  pathlib.Path(workdir, 'study.md').write_text(table)
  pathlib.Path(workdir, 'study.json').write_text(
    json.dumps(dict(zip(map(str, seeds), runs, strict=True)), indent=1)
  )
  return table


def _table(runs: Sequence[dict[str, float]], seeds: Sequence[int]) -> str:
  """Lay out loss and evaluation metrics, one row a metric."""
  names = sorted(
    name.removesuffix('/last')
    for name in runs[0]
    if name.endswith('/last') and name.count('/') == 2
  )
  rows: list[tuple[str, ...]] = [('metric', 'at init', 'trained', 'baseline')]
  rows.append(('loss', *(_spread(runs, f'loss/{w}') for w in _ENDS), ''))
  for name in names:
    if _BASELINE in name:
      continue
    baseline = _baseline_of(name, names)
    rows.append(
      (
        name,
        *(_spread(runs, f'{name}/{w}') for w in _ENDS),
        _spread(runs, f'{baseline}/last') if baseline else '',
      )
    )
  widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
  lines = [
    '| ' + ' | '.join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + ' |'
    for r in rows
  ]
  lines.insert(1, '|' + '|'.join('-' * (w + 2) for w in widths) + '|')
  return f'Seeds {", ".join(map(str, seeds))}\n\n' + '\n'.join(lines) + '\n'


_ENDS = ('first', 'last')
_BASELINE = '_pixels'


def _baseline_of(name: str, names: Sequence[str]) -> str | None:
  """Return the raw-pixel metric of the same label and probe, if there is."""
  label, _, probe = name.partition('_')
  return next(
    (n for n in names if n.startswith(label + _BASELINE) and probe in n), None
  )


def _spread(runs: Sequence[dict[str, float]], key: str) -> str:
  values = [run[key] for run in runs]
  spread = statistics.stdev(values) if len(values) > 1 else 0.0
  return f'{statistics.fmean(values):.3f} ± {spread:.3f}'
