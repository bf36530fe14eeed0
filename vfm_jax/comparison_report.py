"""Write what came of a comparison: one table and one figure."""

import math
import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple, get_args

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from vfm_jax.comparison import Arm, Comparison, Outcome, State, folder_of
from vfm_jax.evals.difficulty import Curves, read_curves
from vfm_jax.plots import save_figure


class Result(NamedTuple):
  """Hold what came of an arm.

  Attributes:
    arm: the arm.
    before: steps of the runs that it goes on from.
    outcomes: one a seed.
    curves: losses by noise level over the training, one a seed that has any.
  """

  arm: Arm
  before: int
  outcomes: Sequence[Outcome]
  curves: Sequence[Curves]

  def final_losses(self) -> list[float]:
    """Return the last held-out loss of the runs that are done."""
    done = [c for c in self.curves if c.steps[-1] == self.outcomes[0].steps]
    return [float(c.losses[-1].mean()) for c in done]

  def measured(self, name: str) -> list[float]:
    """Return a measure of the runs that are done."""
    return [o.measured[name] for o in self.outcomes if name in o.measured]


def write(
  comparison: Comparison,
  outcomes: Mapping[str, Sequence[Outcome]],
  workdir: str,
  seeds: Sequence[int],
) -> str:
  """Write the table (.md) and the figure (.png); return the table.

  Means and sample standard deviations are over the seeds whose runs are done;
  how the others ended is in the table.

  Args:
    comparison: what was run.
    outcomes: by arm, in the order of the seeds.
    workdir: where the runs are.
    seeds: the seeds.
  """
  results = [
    Result(
      arm,
      comparison.steps_before(arm),
      outcomes[arm.name],
      _curves(comparison, arm, workdir, seeds),
    )
    for arm in comparison.arms
  ]
  stem = pathlib.Path(comparison.report or f'{workdir}/study')
  stem.parent.mkdir(parents=True, exist_ok=True)
  text = table(comparison, results, seeds)
  figure(comparison, results, stem.with_suffix('.png'))
  text += f'\n![Curves, distance and loss by noise level]({stem.name}.png)\n'
  stem.with_suffix('.md').write_text(text)
  return text


def table(
  comparison: Comparison, results: Sequence[Result], seeds: Sequence[int]
) -> str:
  """Return the Markdown table, what the arms are, and what was run."""
  names = sorted({n for r in results for o in r.outcomes for n in o.measured})
  # What is the same in all runs, such as the accuracy of the classifier, is no
  # column.
  values = {n: [v for r in results for v in r.measured(n)] for n in names}
  common = {n: v[0] for n, v in values.items() if len(v) > 1 == len(set(v))}
  columns = [n for n in names if n not in common]
  head = ['arm', 'parameters', 'trained', 'steps', 'held-out loss']
  rows = [[*head, *(f'`{n}`' for n in columns), 'runs']]
  for r in results:
    first = r.outcomes[0]
    before = f'{r.before:,} + ' if r.before else ''
    rows.append(
      [
        r.arm.name,
        f'{first.parameters:,}',
        f'{first.trained:,}',
        f'{before}{first.steps:,}',
        _spread(r.final_losses()),
        *(_spread(r.measured(n)) for n in columns),
        _ended(r.outcomes),
      ]
    )
  lines = ['| ' + ' | '.join(row) + ' |' for row in rows]
  lines.insert(1, '|---' * len(rows[0]) + '|')
  parts = [f'# {comparison.title}', comparison.about, '\n'.join(lines)]
  minutes = sum(o.seconds for r in results for o in r.outcomes) / 60
  same = ''.join(f' In all runs `{n}` is {v:.3f}.' for n, v in common.items())
  spread = (
    'Mean ± sample standard deviation over the seeds'
    if len(seeds) > 1
    else 'One value, of the seed'
  )
  parts.append(
    f'{spread} {", ".join(map(str, seeds))}; the runs took '
    f'{minutes:.1f} minutes together, interruptions left out.{same}'
  )
  parts.append(
    '\n'.join(
      f'- **{r.arm.name}**: {r.arm.note}' for r in results if r.arm.note
    )
  )
  errors = [
    f'- {r.arm.name}, seed {seed}: {o.state}. {o.message}'
    for r in results
    for seed, o in zip(seeds, r.outcomes, strict=True)
    if o.state != 'done'
  ]
  if errors:
    parts.append('Not done:\n\n' + '\n'.join(errors))
  return '\n\n'.join(p for p in parts if p) + '\n'


def figure(
  comparison: Comparison, results: Sequence[Result], out: str | os.PathLike
) -> pathlib.Path:
  """Draw three panels as a PNG: curves, distance, loss by noise level."""
  canvas = Figure(figsize=(14.5, 5.4), dpi=110, facecolor='white')
  curves, distance, levels = canvas.subplots(1, 3)
  looks = [_look(i) for i in range(len(results))]
  _draw_curves(curves, results, looks)
  _draw_distance(distance, comparison, results, looks)
  _draw_levels(levels, results, looks)
  for axis in (curves, distance, levels):
    axis.spines[['top', 'right']].set_visible(False)
    axis.grid(color='#e4e7eb', linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8)
  lines, labels = curves.get_legend_handles_labels()
  if lines:
    canvas.legend(
      lines,
      labels,
      loc='lower center',
      ncols=math.ceil(len(lines) / 2),
      frameon=False,
      fontsize=9,
    )
  canvas.tight_layout(rect=(0, 0.1, 1, 1))
  return save_figure(canvas, out)


def _curves(comparison, arm, workdir, seeds) -> list[Curves]:
  files = [
    pathlib.Path(folder_of(workdir, arm, seed), 'metrics.jsonl')
    for seed in seeds
  ]
  # A run may fail before it has evaluated anything.
  wanted = f'"{comparison.levels}/loss'
  return [
    read_curves(f, comparison.levels)
    for f in files
    if f.exists() and wanted in f.read_text()
  ]


def _ended(outcomes: Sequence[Outcome]) -> str:
  counts = {s: sum(o.state == s for o in outcomes) for s in get_args(State)}
  return ', '.join(f'{n} {state}' for state, n in counts.items() if n)


def _spread(values: Sequence[float]) -> str:
  if not values:
    return 'none'
  mean = statistics.fmean(values)
  digits = 0 if abs(mean) >= 100 else 3 if abs(mean) >= 0.1 else 4
  if len(values) == 1:
    return f'{mean:.{digits}f}'
  return f'{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}'


def _look(number: int) -> dict:
  """Return colour and dashes of an arm; the first one is black."""
  if not number:
    return dict(color='black', linestyle='-')
  colours = matplotlib.colormaps['tab10']
  dashes = ('-', '--')[(number - 1) // colours.N % 2]
  return dict(color=colours((number - 1) % colours.N), linestyle=dashes)


def _mean_and_spread(rows) -> tuple[np.ndarray, np.ndarray]:
  """Return mean and sample standard deviation over rows [S, n]."""
  rows = np.stack(rows)
  spread = rows.std(0, ddof=1) if len(rows) > 1 else np.zeros(rows.shape[1])
  return rows.mean(0), spread


def _band(axis, x, rows, look, label) -> None:
  mean, spread = _mean_and_spread(rows)
  axis.plot(x, mean, label=label, linewidth=1.5, **look)
  axis.fill_between(
    x, mean - spread, mean + spread, color=look['color'], alpha=0.12, lw=0
  )


def _whole(result: Result) -> list[Curves]:
  """Return the curves that reach as far as the longest one of the arm."""
  last = max((c.steps[-1] for c in result.curves), default=0)
  return [c for c in result.curves if c.steps[-1] == last]


def _draw_curves(axis, results, looks) -> None:
  for result, look in zip(results, looks, strict=True):
    if curves := _whole(result):
      rows = [c.losses.mean(axis=1) for c in curves]
      x = result.before + curves[0].steps
      _band(axis, x, rows, look, result.arm.name)
  axis.set_yscale('log')
  axis.set_xlabel('step', fontsize=9)
  axis.set_ylabel('held-out loss', fontsize=9)
  axis.set_title('convergence', fontsize=10, loc='left')


def _draw_distance(axis, comparison, results, looks) -> None:
  names = {n for r in results for o in r.outcomes for n in o.measured}
  shown = min(
    (n for n in names if n.startswith(comparison.distance)), default=''
  )
  for place, (result, look) in enumerate(zip(results, looks, strict=True)):
    values = result.measured(shown)
    if not values:
      axis.text(
        0.02,
        place,
        _ended(result.outcomes),
        transform=axis.get_yaxis_transform(),
        fontsize=8,
        va='center',
      )
      continue
    mean, spread = _mean_and_spread(np.array(values)[:, None])
    axis.errorbar(
      mean, [place], xerr=spread, fmt='o', color=look['color'], capsize=3
    )
    axis.plot(values, [place] * len(values), '|', color=look['color'], ms=9)
  axis.set_yticks(range(len(results)), [r.arm.name for r in results])
  axis.set_ylim(len(results) - 0.5, -0.5)
  axis.set_xlabel(shown or comparison.distance, fontsize=8)
  axis.set_title('distance to held-out examples', fontsize=10, loc='left')


def _draw_levels(axis, results, looks) -> None:
  """Draw the last losses over those of the first arm."""
  base = _whole(results[0])
  if not base:
    axis.set_axis_off()
    return
  reference = np.mean([c.losses[-1] for c in base], axis=0)
  for result, look in zip(results, looks, strict=True):
    curves = _whole(result)
    if curves and curves[0].bounds == base[0].bounds:
      bounds = np.array(curves[0].bounds)
      middle = (bounds[:-1] + bounds[1:] - 1) / 2
      rows = [c.losses[-1] / reference for c in curves]
      _band(axis, middle, rows, look, None)
  axis.set_xlabel('noise level', fontsize=9)
  axis.set_ylabel(f'loss / loss of {results[0].arm.name}', fontsize=9)
  axis.set_title('last held-out loss by noise level', fontsize=10, loc='left')
