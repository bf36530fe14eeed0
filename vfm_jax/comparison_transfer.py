"""Tell from a comparison whether clusters of noise levels disturb each other.

The negative transfer gap of ANT (arXiv:2306.00354, section 3) sets a model
that is trained on one cluster alone against one that is trained on all. Here
it is told by the held-out loss in the cluster,

    gap = loss of the model of the cluster - loss of the model of all,

below 0 where the cluster is learned better alone: that is ours.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vfm_jax.comparison_table import Result, markdown, spread
from vfm_jax.evals import level_plots
from vfm_jax.experiment import Experiment
from vfm_jax.ops.strata import SoftInterval


class Gap(NamedTuple):
  """Hold what came of a cluster.

  Attributes:
    low: its first noise level.
    high: the one after its last.
    alone: last losses of the model of the cluster, by seed.
    together: those of the model of all.
  """

  low: int
  high: int
  alone: Sequence[float]
  together: Sequence[float]

  @property
  def levels(self) -> str:
    """Return the noise levels as text."""
    return f'{self.low}-{self.high - 1}'

  @property
  def gaps(self) -> list[float]:
    """Return the gap of each seed."""
    both = zip(self.alone, self.together, strict=True)
    return [alone - together for alone, together in both]


def cluster_of(experiment: Experiment) -> tuple[int, int] | None:
  """Return the only noise levels that a run learns, or None for all of them.

  Those are the first one and the one after the last of a `SoftInterval` that
  is never left.
  """
  times = getattr(experiment.objective, 'times', None)
  if not isinstance(times, SoftInterval) or times.own < 1.0:
    return None
  low, high = times.intervals.bounds[times.interval :][:2]
  return low, high


def gaps(results: Sequence[Result]) -> list[Gap]:
  """Return the gap of each arm that learns one cluster, to the first arm.

  Seeds of which a run is not done are left out, and clusters without a seed.

  Raises:
    ValueError: the losses were taken over ranges that a cluster cuts.
  """
  out = []
  for result in results[1:]:
    cluster = cluster_of(result.arm.experiment)
    both = [
      pair
      for pair in zip(result.done, results[0].done, strict=True)
      if None not in pair
    ]
    if cluster is None or not both:
      continue
    path = f'arm {result.arm.name!r}, objective.times'
    alone, together = (
      [_last(curves, cluster, path) for curves in runs]
      for runs in zip(*both, strict=True)
    )
    out.append(Gap(*cluster, alone, together))
  return out


def report(gaps: Sequence[Gap], picture: str | os.PathLike) -> str:
  """Draw the gaps; return their table in Markdown."""
  names = [g.levels for g in gaps]
  level_plots.gap_bars(names, [g.gaps for g in gaps], picture)
  rows = [('noise levels', 'alone', 'together', 'gap')]
  rows += [
    (g.levels, *map(spread, (g.alone, g.together, g.gaps))) for g in gaps
  ]
  return (
    'Held-out losses of models that learn one cluster alone, and of the first '
    'arm in that cluster. A gap below 0 is negative transfer.\n\n'
    + markdown(rows)
  )


def _last(curves, cluster, path) -> float:
  """Return the last loss in a cluster."""
  if not set(cluster) <= set(curves.bounds):
    raise ValueError(
      f'{path}: expected a cluster of whole intervals of the Difficulty '
      f'evaluator, {curves.bounds}, found the levels {cluster}'
    )
  ends = np.array(curves.bounds)
  inside = (ends[:-1] >= cluster[0]) & (ends[1:] <= cluster[1])
  widths = np.diff(ends)[inside]
  return float(np.average(curves.losses[-1][inside], weights=widths))
