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
  """Draw how the loss of each interval fell, and where it ended, as a PNG.

  Args:
    steps: int [n], of training.
    losses: f64 [n, K], of interval i at its row's step.
    bounds: the K + 1 ends of the intervals.
    out: file to write.
  """
  figure = Figure(figsize=(10.4, 4.0), dpi=110, facecolor='white')
  fall, last = figure.subplots(1, 2)
  colours = matplotlib.colormaps['viridis']
  count = losses.shape[1]
  for i in range(count):
    label = f'{bounds[i]}-{bounds[i + 1] - 1}' if i in (0, count - 1) else None
    colour = colours(i / max(count - 1, 1))
    fall.plot(steps, losses[:, i] / losses[0, i], color=colour, label=label)
  fall.legend(frameon=False, fontsize=8)
  last.stairs(losses[-1], bounds, color='black')
  for axis, x, y in (
    (fall, 'step', 'loss / first loss'),
    (last, 'noise level', f'loss at step {steps[-1]:,}'),
  ):
    axis.set_yscale('log')
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
  fall.set_title('loss by noise level', fontsize=10, loc='left')
  figure.tight_layout()
  return save_figure(figure, out)


def entropy_curve(nats: np.ndarray, out: str | os.PathLike) -> pathlib.Path:
  """Draw relative entropies [L - 1] of levels to the next ones as a PNG."""
  figure = Figure(figsize=(6.4, 4.0), dpi=110, facecolor='white')
  axis = figure.subplots()
  axis.plot(np.arange(len(nats)), nats, color='black')
  axis.set_yscale('log')
  axis.set_xlabel('noise level', fontsize=9)
  axis.set_ylabel('nats a dimension', fontsize=9)
  axis.set_title('entropy relative to the next level', fontsize=10, loc='left')
  figure.tight_layout()
  return save_figure(figure, out)


def gap_bars(
  names: Sequence[str],
  gaps: Sequence[Sequence[float]],
  out: str | os.PathLike,
) -> pathlib.Path:
  """Draw the mean gap of each cluster, and those of the seeds, as a PNG.

  Args:
    names: of the clusters.
    gaps: one a seed, for each cluster.
    out: file to write.
  """
  figure = Figure(figsize=(6.4, 4.0), dpi=110, facecolor='white')
  axis = figure.subplots()
  axis.bar(names, [np.mean(g) for g in gaps], color='#9fb8d0', width=0.6)
  for name, values in zip(names, gaps, strict=True):
    axis.plot([name] * len(values), values, '_', color='black', ms=14)
  axis.axhline(0.0, color='black', linewidth=0.8)
  axis.set_xlabel('noise levels', fontsize=9)
  axis.set_ylabel('loss alone - loss together', fontsize=9)
  axis.set_title('gap of each cluster', fontsize=10, loc='left')
  axis.tick_params(labelsize=8)
  figure.tight_layout()
  return save_figure(figure, out)
