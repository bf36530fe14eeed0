"""Tell how fast the noise levels were learned in a run.

The convergence analysis of the denoising curriculum (arXiv:2403.10348), from
what a `Difficulty` evaluator reported; reconstructed, as there.
"""

import dataclasses
import itertools
import os
import re
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from vfm_jax import plots
from vfm_jax.evals import level_plots
from vfm_jax.evals.base import Writes
from vfm_jax.objectives.base import PyTree


@dataclasses.dataclass(frozen=True)
class Convergence(Writes):
  """Tell when losses had fallen; satisfies `evals.base.Evaluator`.

  It is for the verb `eval`, after a run, and writes `curves.png`.

  Attributes:
    levels: name of the run's `Difficulty` evaluator.
    share: see `steps_to_converge`.
    metrics: file of JSON lines to read; None is that of the run.
    folder: see `Writes`.
  """

  levels: str = 'levels'
  share: float = 0.9
  metrics: str | None = None

  def __post_init__(self):
    if not 0.0 < self.share <= 1.0:
      raise ValueError(
        f'convergence: expected `share` above 0 to 1, found {self.share}'
      )

  def in_run(self, workdir: str, name: str) -> Self:
    """Return the evaluator that reads, and writes to, a run."""
    metrics = self.metrics or f'{workdir}/metrics.jsonl'
    return dataclasses.replace(super().in_run(workdir, name), metrics=metrics)

  def run(
    self,
    objective: Any,
    params: PyTree,
    *,
    seed: int,
    mesh: jax.sharding.Mesh | None = None,
  ) -> dict[str, float]:
    """Return steps, as `steps<percent>_<first level>-<last level>`.

    Args:
      objective: not used, nor are the others: all is in the file.
      params: not used.
      seed: not used.
      mesh: not used.

    Raises:
      ValueError: see `read_curves`, or outside of a run no file is named.
    """
    del objective, params, seed, mesh
    if self.metrics is None:
      raise ValueError('convergence: expected a file in `metrics`, found None')
    curves = read_curves(self.metrics, self.levels)
    steps = steps_to_converge(curves.steps, curves.losses, share=self.share)
    if folder := self.made():
      level_plots.interval_curves(*curves, folder / 'curves.png')
    ranges = itertools.pairwise(curves.bounds)
    return {
      f'steps{100 * self.share:.0f}_{low}-{high - 1}': float(at)
      for (low, high), at in zip(ranges, steps, strict=True)
    }


class Curves(NamedTuple):
  """Hold how the losses of intervals fell over a run.

  Attributes:
    steps: int64 [n] of the evaluations.
    losses: f64 [n, K].
    bounds: the K + 1 ends of the intervals.
  """

  steps: np.ndarray
  losses: np.ndarray
  bounds: tuple[int, ...]


def read_curves(path: str | os.PathLike, name: str) -> Curves:
  """Read what a `Difficulty` evaluator reported over a run.

  Args:
    path: the run's metrics, JSON lines.
    name: of the evaluator in `config.evals`.

  Raises:
    ValueError: it reported nothing there, or not the same at each step.
  """
  pattern = re.compile(rf'{re.escape(name)}/loss\d+_(\d+)-(\d+)')
  found = {}
  for metric, curve in plots.read_jsonl(path).items():
    if match := pattern.fullmatch(metric):
      found[int(match[1]), int(match[2]) + 1] = curve
  ranges = sorted(found)
  bounds = (*(low for low, _ in ranges), *(high for _, high in ranges[-1:]))
  if not ranges or list(itertools.pairwise(bounds)) != ranges:
    raise ValueError(
      f'expected the losses of a Difficulty evaluator named {name!r} in '
      f'{os.fspath(path)}, found those of the noise levels {ranges}'
    )
  steps = found[ranges[0]][0]
  if any(not np.array_equal(steps, found[r][0]) for r in ranges):
    raise ValueError(
      f'expected all losses of {name!r} in {os.fspath(path)} at the same '
      'steps, found others'
    )
  return Curves(steps, np.stack([found[r][1] for r in ranges], axis=1), bounds)


def steps_to_converge(
  steps: np.ndarray, losses: np.ndarray, *, share: float = 0.9
) -> np.ndarray:
  """Return when each loss has done `share` of its fall, f64 [K].

  The fall is that from the first to the smallest loss; between evaluations the
  loss is taken to be linear. A loss that never falls gives NaN.

  Args:
    steps: int [n], ascending.
    losses: f64 [n, K].
    share: in (0, 1].
  """
  out = np.full(losses.shape[1], np.nan)
  for i, loss in enumerate(losses.T):
    goal = loss[0] - share * (loss[0] - loss.min())
    if loss.min() < loss[0]:
      after = int(np.argmax(loss <= goal))
      part = (loss[after - 1] - goal) / (loss[after - 1] - loss[after])
      out[i] = steps[after - 1] + part * (steps[after] - steps[after - 1])
  return out
