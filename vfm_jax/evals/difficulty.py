"""Measure how hard the noise levels are.

The denoising curriculum (arXiv:2403.10348) rests on two observations: clean
levels converge more slowly than noisy ones (`evals.convergence`), and the
relative entropy between consecutive marginals is larger there
(`evals.marginals`). Its code is not public. The paper trains one network an
interval; here one network is scored on each, which costs no further training.
That, and the formulas, are our reconstruction.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import numpy as np

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
