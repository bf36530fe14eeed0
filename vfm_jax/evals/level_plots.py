"""Draw what differs between noise levels.

As in `vfm_jax.plots`, figures are built on their own canvas.
"""

import os
import pathlib
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from vfm_jax.plots import save_figure


def affinity_map(
  affinity: np.ndarray, at: np.ndarray, out: str | os.PathLike
) -> pathlib.Path:
  """Draw cosines [L, L] between noise levels `at` [L] as a PNG."""
  figure = Figure(figsize=(5.2, 4.4), dpi=110, facecolor='white')
  axis = figure.subplots()
  shown = axis.imshow(affinity, cmap='RdBu_r', vmin=-1.0, vmax=1.0)
  ticks = np.unique(np.linspace(0, len(at) - 1, 6).round().astype(int))
  names = [str(int(at[i])) for i in ticks]
  axis.set_xticks(ticks, names, fontsize=8)
  axis.set_yticks(ticks, names, fontsize=8)
  axis.set_xlabel('noise level', fontsize=9)
  axis.set_ylabel('noise level', fontsize=9)
  axis.set_title('cosine of gradients', fontsize=10, loc='left')
  figure.colorbar(shown, ax=axis, fraction=0.046)
  figure.tight_layout()
  return save_figure(figure, out)


def interval_curves(
  steps: np.ndarray,
  losses: np.ndarray,
  bounds: Sequence[int],
  out: str | os.PathLike,
) -> pathlib.Path:
  """Draw the loss of each interval relative to its first one, as a PNG.

  Args:
    steps: int [n], of training.
    losses: f64 [n, K], of interval i at its row's step.
    bounds: the K + 1 ends of the intervals.
    out: file to write.
  """
  figure = Figure(figsize=(6.4, 4.0), dpi=110, facecolor='white')
  axis = figure.subplots()
  colours = matplotlib.colormaps['viridis']
  count = losses.shape[1]
  for i in range(count):
    label = f'{bounds[i]}-{bounds[i + 1] - 1}' if i in (0, count - 1) else None
    colour = colours(i / max(count - 1, 1))
    axis.plot(steps, losses[:, i] / losses[0, i], color=colour, label=label)
  axis.set_yscale('log')
  axis.set_xlabel('step', fontsize=9)
  axis.set_ylabel('loss / first loss', fontsize=9)
  axis.set_title('loss by noise level', fontsize=10, loc='left')
  axis.legend(frameon=False, fontsize=8)
  figure.tight_layout()
  return save_figure(figure, out)
