"""Measure how far the marginals of consecutive noise levels are apart.

The denoising curriculum (arXiv:2403.10348) takes the relative entropy between
them for the difficulty of a level; the formula is our reconstruction.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfm_jax.data.latent_pipeline import LatentPipeline
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.evals import level_plots
from vfm_jax.evals.base import Writes, to_host
from vfm_jax.evals.levels import as_denoiser, batches_of
from vfm_jax.objectives.base import PyTree
from vfm_jax.ops.intervals import Intervals, uniform
from vfm_jax.ops.process import NOISE_LEVELS, Process, check_reachable


@dataclasses.dataclass(frozen=True)
class RelativeEntropy(Writes):
  """Measure `relative_entropy` of data; satisfies `evals.base.Evaluator`.

  It asks the process alone, not the network, and writes `entropy.png`.

  Attributes:
    data: examples.
    intervals: of noise levels, over which it is added up.
    count: number of examples; None is all.
    batch_size: examples at a time.
    folder: see `Writes`.
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
    """Return sums of nats, as `entropy<examples>_<first level>-<last level>`.

    A level counts with the step to the next one, the noisiest with none.

    Args:
      objective: a `Denoise`, or `Experts`.
      params: its parameters.
      seed: not used: nothing is drawn at random.
      mesh: splits batches over it; None uses one device.

    Raises:
      TypeError: the objective is another.
      ValueError: its process lacks a level, or there are no examples.
    """
    del seed
    objective, _ = as_denoiser(objective, params, type(self).__name__)
    batches = batches_of(self.data, self.batch_size, self.count, mesh)
    x0 = [
      to_host(objective.clean(batch))[to_host(batch['valid'])]
      for batch in batches
    ]
    if not sum(map(len, x0)):
      raise ValueError(f'{self.data.path}: expected examples, found none')
    x0 = np.concatenate(x0)
    nats = relative_entropy(x0, *coefficients(objective.process))
    if folder := self.made():
      level_plots.entropy_curve(nats, folder / 'entropy.png')
    return {
      f'entropy{len(x0)}_{low}-{high - 1}': float(nats[low:high].sum())
      for low, high in itertools.pairwise(self.intervals.bounds)
    }


def coefficients(process: Process) -> tuple[np.ndarray, np.ndarray]:
  """Return alpha and sigma of x_t at each noise level, f32 [NOISE_LEVELS].

  Where a level has several times it is one of them, at the same place in all.

  Raises:
    ValueError: the process has no time in a level.
  """
  level = jnp.arange(NOISE_LEVELS)
  ranges = itertools.pairwise(range(NOISE_LEVELS + 1))
  check_reachable(process, ranges, 'relative entropy')
  keys = jnp.broadcast_to(jax.random.key(0), level.shape)
  t = process.draw_within(keys, level, level + 1)
  one, zero = jnp.ones(NOISE_LEVELS), jnp.zeros(NOISE_LEVELS)
  alpha, sigma = process.corrupt(one, zero, t), process.corrupt(zero, one, t)
  return np.asarray(alpha), np.asarray(sigma)


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
