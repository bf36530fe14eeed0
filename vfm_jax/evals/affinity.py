"""Measure how well the gradients of noise levels agree.

The task affinity of ANT (arXiv:2306.00354, section 3): the cosine between the
gradients of the loss at two noise levels. It is high between neighbours, and
where it is low the levels disturb each other. `ops.clustering.by_affinity`
makes intervals of it.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfm_jax.data.latent_pipeline import LatentPipeline
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.evals import level_plots
from vfm_jax.evals.base import Held, Writes, to_host
from vfm_jax.evals.levels import as_denoiser, batches_of, loss_at
from vfm_jax.objectives.base import Batch, PyTree
from vfm_jax.objectives.denoise import Denoise
from vfm_jax.ops.process import NOISE_LEVELS, check_reachable


def gradient_affinity(
  objective: Denoise,
  params: PyTree,
  batches: Iterable[Batch],
  at: Iterable[int],
  *,
  seed: int = 0,
  sketch: int | None = 4096,
) -> np.ndarray:
  """Return the cosines between gradients at noise levels, f64 [L, L].

  The gradient of a level is the sum over the batches of that of the mean loss,
  as in training: labels are dropped, and noise is drawn anew for each level and
  batch. Averaging over several checkpoints of a run is up to the caller.

  Args:
    objective: whose loss it is.
    params: its parameters.
    batches: with `valid` or without.
    at: the noise levels [L].
    seed: of noise, dropped labels and the sketch.
    sketch: length of the random projection of the gradients that is kept, so
      that L times the parameters need not fit into memory. A cosine is then off
      by about 1 / sqrt(sketch). It is ours: the paper keeps the gradients, as
      None does.

  Raises:
    ValueError: the process does not know a level, there are no batches, or a
      gradient is not finite or 0.
  """
  at = list(at)
  check_reachable(
    objective.process, ((x, x + 1) for x in at), 'the levels of the affinity'
  )
  noise_key, sketch_key = jax.random.split(jax.random.key(seed))
  held, rows = Held(objective), None
  for number, batch in enumerate(batches):
    keys = jax.random.split(jax.random.fold_in(noise_key, number), len(at))
    found = np.stack(
      [
        to_host(_gradient(held, sketch, params, batch, key, sketch_key, level))
        for key, level in zip(keys, at, strict=True)
      ]
    )
    rows = found if rows is None else rows + found
  if rows is None:
    raise ValueError('no batches to take gradients of: the data is empty')
  rows = rows.astype(np.float64)
  norm = np.linalg.norm(rows, axis=1, keepdims=True)
  bad = ~(np.isfinite(norm) & (norm > 0))[:, 0]
  if bad.any():
    raise ValueError(
      'expected finite gradients other than 0, found others at the noise '
      f'levels {[level for level, b in zip(at, bad, strict=True) if b]}'
    )
  rows /= norm
  return rows @ rows.T


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradient(held, sketch, params, batch, key, sketch_key, level):
  """Return the gradient at a level, or its sketch, f32 [D]."""

  def mean(params):
    out = loss_at(
      held.objective, params, batch, key, level, level + 1, train=True
    )
    return out.sums.sum() / jnp.maximum(out.counts.sum(), 1.0)

  leaves = [g.ravel() for g in jax.tree.leaves(jax.grad(mean)(params))]
  if sketch is None:
    return jnp.concatenate(leaves)
  keys = jax.random.split(sketch_key, len(leaves))
  return sum(_fold(g, k, sketch) for g, k in zip(leaves, keys, strict=True))


def _fold(x: jax.Array, key: jax.Array, size: int) -> jax.Array:
  """Add the entries of x to random places of [size], with random signs.

  This keeps inner products in the mean (count sketch), and needs no matrix.
  """
  place, sign = jax.random.split(key)
  where = jax.random.randint(place, x.shape, 0, size)
  signed = x * jax.random.rademacher(sign, x.shape, x.dtype)
  return jax.ops.segment_sum(signed, where, size)


@dataclasses.dataclass(frozen=True)
class TaskAffinity(Writes):
  """Measure the affinity of noise levels; satisfies `evals.base.Evaluator`.

  It writes `affinity.npz`, of `levels` [L] and `affinity` [L, L], for
  `ops.clustering.by_affinity`, and its picture `affinity.png`.

  Attributes:
    data: examples whose loss it is.
    levels: how many noise levels, evenly from the cleanest to the noisiest.
    count: number of examples; None is all.
    batch_size: examples at a time.
    sketch: see `gradient_affinity`.
    folder: see `Writes`.
  """

  data: Pipeline | LatentPipeline
  levels: int = 20
  count: int | None = 1000
  batch_size: int = 100
  sketch: int | None = 4096

  def __post_init__(self):
    if not 2 <= self.levels <= NOISE_LEVELS:
      raise ValueError(
        f'task affinity: expected `levels` from 2 to {NOISE_LEVELS}, found '
        f'{self.levels}'
      )
    if self.sketch is not None and self.sketch < 1:
      raise ValueError(
        f'task affinity: expected `sketch` of 1 or more, or None, found '
        f'{self.sketch}'
      )

  def run(
    self,
    objective: Any,
    params: PyTree,
    *,
    seed: int,
    mesh: jax.sharding.Mesh | None = None,
  ) -> dict[str, float]:
    """Return means of the cosines, as `affinity_<levels>x<examples>_<which>`.

    `near` is the mean over neighbouring levels, `all` that over all pairs of
    two, and `least` the smallest.

    Args:
      objective: a `Denoise`, or `Experts`.
      params: its parameters.
      seed: see `gradient_affinity`.
      mesh: splits batches over it; None uses one device.

    Raises:
      TypeError: the objective is another.
      ValueError: see `gradient_affinity`.
    """
    objective, params = as_denoiser(objective, params, type(self).__name__)
    at = np.rint(np.linspace(0, NOISE_LEVELS - 1, self.levels)).astype(int)
    found = gradient_affinity(
      objective,
      params,
      batches_of(self.data, self.batch_size, self.count, mesh),
      at.tolist(),
      seed=seed,
      sketch=self.sketch,
    )
    if folder := self.made():
      np.savez(folder / 'affinity.npz', levels=at, affinity=found)
      level_plots.affinity_map(found, at, folder / 'affinity.png')
    pairs = found[np.triu_indices(len(at), 1)]
    there = self.data.num_examples
    name = f'affinity_{len(at)}x{min(self.count or there, there)}'
    return {
      f'{name}_near': float(np.diagonal(found, 1).mean()),
      f'{name}_all': float(pairs.mean()),
      f'{name}_least': float(pairs.min()),
    }
