"""Give evaluators the loss of a denoiser at the noise levels they ask for."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfm_jax import sharding
from vfm_jax.data.latent_pipeline import LatentPipeline
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.objectives.base import Batch, LossOut, PyTree
from vfm_jax.objectives.denoise import Denoise
from vfm_jax.objectives.experts import Experts
from vfm_jax.ops.process import Process


def loss_at(
  objective: Denoise,
  params: PyTree,
  batch: Batch,
  rng: jax.Array,
  low: jax.Array,
  high: jax.Array,
  *,
  train: bool = False,
) -> LossOut:
  """Return the loss of all examples, as one task, at times of some levels.

  Args:
    objective: whose loss it is; how it draws its times does not matter.
    params: its parameters.
    batch: as in its `loss`.
    rng: of times and noise.
    low: int32 [], the first noise level.
    high: int32 [], the one after the last.
    train: as in its `loss`.
  """
  at = dataclasses.replace(
    objective,
    process=_Focused(objective.process, low, high),
    times=None,
    tasks=None,
    auxiliary=None,
  )
  return at.loss(params, {}, batch, rng, train=train)


def as_denoiser(
  objective: Any, params: PyTree, name: str
) -> tuple[Denoise, PyTree]:
  """Return a denoiser of all noise levels, and its parameters.

  Args:
    objective: a `Denoise`, or `Experts`, which become one.
    params: its parameters.
    name: of the evaluator, for the error.

  Raises:
    TypeError: the objective is another.
  """
  if isinstance(objective, Experts):
    return objective.as_one(params)
  if not isinstance(objective, Denoise):
    raise TypeError(
      f'{name} needs config.objective to be a Denoise or Experts, found '
      f'{type(objective).__name__}'
    )
  return objective, params


def batches_of(
  pipeline: Pipeline | LatentPipeline,
  batch_size: int,
  count: int | None,
  mesh: jax.sharding.Mesh | None,
) -> Iterator[Batch]:
  """Yield batches of the first `count` examples, placed on a mesh if any.

  Args:
    pipeline: of examples, several views of one counting as several.
    batch_size: of the global batch.
    count: number of examples; None is all.
    mesh: devices to split a batch over.
  """
  slot, slots = sharding.process_slot(mesh)
  with pipeline.eval_batches(
    batch_size, process_index=slot, process_count=slots
  ) as batches:
    for number, batch in enumerate(batches):
      start = number * batch_size
      if count is not None and start >= count:
        return
      if count is not None:
        wanted = start + np.asarray(batch['row']) < count
        batch = {**batch, 'valid': batch['valid'] & wanted}
      yield dict(batch) if mesh is None else sharding.put_batch(batch, mesh)


class _Focused:
  """A process whose times in training are of some noise levels alone."""

  def __init__(self, process: Process, low: jax.Array, high: jax.Array):
    self._process, self._low, self._high = process, low, high

  def __getattr__(self, name: str) -> Any:
    return getattr(self._process, name)

  def draw_time(self, keys: jax.Array) -> jax.Array:
    """Return a time [B] a key, of these levels."""
    ends = (jnp.full(len(keys), x, jnp.int32) for x in (self._low, self._high))
    return self._process.draw_within(keys, *ends)
