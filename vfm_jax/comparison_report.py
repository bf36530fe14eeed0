"""Write what came of a comparison: one table and one figure."""

import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from vfm_jax import comparison_planes, comparison_transfer
from vfm_jax.comparison import Comparison, Outcome, folder_of
from vfm_jax.comparison_planes import mean_and_spread
from vfm_jax.comparison_table import Result, ended, table
from vfm_jax.evals.convergence import Curves, read_curves
from vfm_jax.plots import save_figure


def write(
  comparison: Comparison,
  outcomes: Mapping[str, Sequence[Outcome]],
  workdir: str,
  seeds: Sequence[int],
) -> str:
  """Write the table (.md) and the figures; return the table.

  The curves of denoisers are in a .png, `comparison.planes` in a _plane.png.

  Where arms learn one cluster of noise levels alone, their gaps follow, see
  `comparison_transfer`, with a figure (_gap.png).

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
      [_curves(comparison, arm, workdir, seed) for seed in seeds],
    )
    for arm in comparison.arms
  ]
  stem = pathlib.Path(comparison.report or f'{workdir}/study')
  stem.parent.mkdir(parents=True, exist_ok=True)
  text = table(comparison, results, seeds)
  if comparison.levels is not None:
    figure(comparison, results, stem.with_suffix('.png'))
    text += f'\n![Curves, distance and loss by noise level]({stem.name}.png)\n'
  if comparison.planes:
    picture = stem.with_name(f'{stem.name}_plane.png')
    comparison_planes.figure(comparison.planes, results, picture)
    text += f'\n![{", ".join(comparison.planes)}]({picture.name})\n'
  if gaps := comparison_transfer.gaps(results):
    picture = stem.with_name(f'{stem.name}_gap.png')
    text += f'\n{comparison_transfer.report(gaps, picture)}\n'
    text += f'\n![Gap of each cluster]({picture.name})\n'
  stem.with_suffix('.md').write_text(text)
  return text


def figure(
  comparison: Comparison, results: Sequence[Result], out: str | os.PathLike
) -> pathlib.Path:
  """Draw three panels as a PNG: curves, distance, loss by noise level."""
  canvas = Figure(figsize=(14.5, 5.4), dpi=110, facecolor='white')
  curves, distance, levels = canvas.subplots(1, 3)
  looks = [comparison_planes.look(i) for i in range(len(results))]
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


def _curves(comparison, arm, workdir, seed) -> Curves | None:
  file = pathlib.Path(folder_of(workdir, arm, seed), 'metrics.jsonl')
  # A run may fail before it has evaluated anything.
  wanted = f'"{comparison.levels}/loss'
  if not file.exists() or wanted not in file.read_text():
    return None
  return read_curves(file, comparison.levels)


def _band(axis, x, rows, look, label) -> None:
  mean, spread = mean_and_spread(rows)
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
        ended(result.outcomes),
        transform=axis.get_yaxis_transform(),
        fontsize=8,
        va='center',
      )
      continue
    mean, spread = mean_and_spread(np.array(values)[:, None])
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
