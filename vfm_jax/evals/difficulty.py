"""Measure how hard the noise levels are, and how fast they are learned.

The denoising curriculum (arXiv:2403.10348) rests on two observations: clean
levels converge more slowly than noisy ones, and the relative entropy between
consecutive marginals is larger there. Its code is not public. The paper trains
one network an interval; here one network is scored on each, which costs no
further training. That, and the formulas below, are our reconstruction.
"""

import dataclasses
import functools
import itertools
import os
import re
from typing import Any, NamedTuple

import jax
import numpy as np

from vfm_jax import plots
from vfm_jax.data.latent_pipeline import LatentPipeline
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.evals.base import Held, to_host
from vfm_jax.evals.levels import as_denoiser, batches_of, loss_at
from vfm_jax.objectives.base import PyTree
from vfm_jax.ops.intervals import Intervals, uniform
from vfm_jax.ops.process import check_reachable


@dataclasses.dataclass(frozen=True)
class Difficulty:
  """Score intervals of noise levels apart; satisfies `evals.base.Evaluator`.

  Each example is scored once in each interval, at a time of it; times and noise
  are the same at each evaluation, so that curves over the training compare.

  Attributes:
    data: held-out examples.
    intervals: what to tell apart.
    count: number of examples; None is all.
    batch_size: examples at a time.
  """

  data: Pipeline | LatentPipeline
  intervals: Intervals = uniform(20)
  count: int | None = 500
  batch_size: int = 50

  def run(
    self,
    objective: Any,
    params: PyTree,
    *,
    seed: int,
    mesh: jax.sharding.Mesh | None = None,
  ) -> dict[str, float]:
    """Return mean losses, as `loss<examples>_<first level>-<last level>`.

    Args:
      objective: a `Denoise`, or `Experts`.
      params: its parameters.
      seed: of times and noise.
      mesh: splits batches over it; None uses one device.

    Raises:
      TypeError: the objective is another.
      ValueError: its process has no times in an interval, or there are no
        examples.
    """
    objective, params = as_denoiser(objective, params, type(self).__name__)
    ranges = list(itertools.pairwise(self.intervals.bounds))
    check_reachable(objective.process, ranges, 'difficulty.intervals')
    held, key = Held(objective), jax.random.key(seed)
    sums, counts = np.zeros(len(ranges)), np.zeros(len(ranges))
    batches = batches_of(self.data, self.batch_size, self.count, mesh)
    for number, batch in enumerate(batches):
      rng = jax.random.fold_in(key, number)
      for i, (low, high) in enumerate(ranges):
        total, count = _score(held, params, batch, rng, low, high)
        sums[i] += to_host(total)
        counts[i] += to_host(count)
    if not counts.all():
      raise ValueError(
        f'{self.data.path}: expected examples to score, found none that are '
        'valid'
      )
    examples = int(counts[0])
    return {
      f'loss{examples}_{low}-{high - 1}': float(loss)
      for (low, high), loss in zip(ranges, sums / counts, strict=True)
    }


@functools.partial(jax.jit, static_argnums=0)
def _score(held, params, batch, rng, low, high):
  out = loss_at(held.objective, params, batch, rng, low, high)
  return out.sums.sum(), out.counts.sum()


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


def relative_entropy(
  x0: np.ndarray, alpha: np.ndarray, sigma: np.ndarray
) -> np.ndarray:
  """Return KL(q(x_{t-1}) || q(x_t)), nats a dimension, f64 [T - 1].

  x_t = alpha_t x0 + sigma_t eps, and each marginal is taken as the normal one
  of its mean and covariance: the true ones are not known, and the direction is
  our choice. It says nothing of what the data has beyond its covariance.

  Args:
    x0: [N, ...] examples.
    alpha: [T] from the cleanest step.
    sigma: [T], none of them 0.
  """
  x = np.asarray(x0, np.float64).reshape(len(x0), -1)
  alpha, sigma = np.asarray(alpha, np.float64), np.asarray(sigma, np.float64)
  mean = x.mean(axis=0)
  _, scale, basis = np.linalg.svd(x - mean, full_matrices=False)
  # Directions in which the examples differ, and what is left: there they have
  # no variance.
  variance = np.append(np.square(scale) / len(x), 0.0)
  along = basis @ mean
  rest = max(np.square(mean).sum() - np.square(along).sum(), 0.0)
  squares = np.append(np.square(along), rest)
  times = np.append(np.ones(len(scale)), x.shape[1] - len(scale))

  spread = np.square(alpha)[:, None] * variance + np.square(sigma)[:, None]
  ratio = spread[:-1] / spread[1:]
  moved = np.square(np.diff(alpha))[:, None] * squares / spread[1:]
  divergence = times * (ratio - 1.0 - np.log(ratio)) + moved
  return 0.5 * divergence.sum(axis=1) / x.shape[1]
