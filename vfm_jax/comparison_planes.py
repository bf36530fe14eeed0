"""Draw the arms of a comparison as points of planes."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from vfm_jax.comparison_table import Result
from vfm_jax.plots import save_figure


def figure(
  planes: Mapping[str, tuple[str, str]],
  results: Sequence[Result],
  out: str | os.PathLike,
) -> pathlib.Path:
  """Draw a panel for each plane as a PNG, with means and deviations.

  Arms without both measures of a plane are left out of it.

  Args:
    planes: by title, the measures (across, up).
    results: of the arms.
    out: the file.
  """
  canvas = Figure(figsize=(4.6 * len(planes), 4.8), dpi=110, facecolor='white')
  panels = canvas.subplots(1, len(planes), squeeze=False)[0]
  for axis, (title, names) in zip(panels, planes.items(), strict=True):
    for number, result in enumerate(results):
      values = [result.measured(name) for name in names]
      if all(values):
        (x, dx), (y, dy) = (
          np.concatenate(mean_and_spread(np.array(v)[:, None])) for v in values
        )
        colour = look(number)['color']
        axis.errorbar(x, y, xerr=dx, yerr=dy, fmt='o', color=colour, capsize=3)
        axis.annotate(
          result.arm.name,
          (x, y),
          xytext=(6, 6),
          textcoords='offset points',
          fontsize=9,
          color=colour,
        )
    axis.set_xlabel(names[0], fontsize=8)
    axis.set_ylabel(names[1], fontsize=8)
    axis.set_title(title, fontsize=10, loc='left')
    axis.margins(0.2)
    axis.spines[['top', 'right']].set_visible(False)
    axis.grid(color='#e4e7eb', linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8)
  canvas.tight_layout()
  return save_figure(canvas, out)


def look(number: int) -> dict[str, Any]:
  """Return colour and dashes of an arm; the first one is black."""
  if not number:
    return dict(color='black', linestyle='-')
  colours = matplotlib.colormaps['tab10']
  dashes = ('-', '--')[(number - 1) // colours.N % 2]
  return dict(color=colours((number - 1) % colours.N), linestyle=dashes)


def mean_and_spread(rows: Any) -> tuple[np.ndarray, np.ndarray]:
  """Return mean and sample standard deviation over rows [S, n]."""
  rows = np.stack(rows)
  spread = rows.std(0, ddof=1) if len(rows) > 1 else np.zeros(rows.shape[1])
  return rows.mean(0), spread
