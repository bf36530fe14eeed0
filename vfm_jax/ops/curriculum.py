"""Start the training with some noise levels and add the others in stages.

The curriculum of denoising tasks (arXiv:2403.10348): with clusters C_1, the
cleanest, to C_N, stage n trains on the n noisiest, which are the easiest, and
goes on to the next when the loss has not fallen for a while. The paper has no
public code. How its loss is smoothed and compared is not known: both are
settings here, and off by default.
"""

import dataclasses
import itertools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from vfm_jax.ops.intervals import Intervals, uniform
from vfm_jax.ops.process import Process, check_reachable
from vfm_jax.ops.strata import check_slices, check_tasks, slot_of


class Stage(NamedTuple):
  """Hold where a curriculum is.

  Attributes:
    number: int32 [], the stage n, from 1 to N.
    best: f32 [], the smallest loss of this stage; inf before the first.
    counter: int32 [], steps since then.
    smoothed: f32 [], average of the losses of this stage; NaN before the first.
  """

  number: jax.Array
  best: jax.Array
  counter: jax.Array
  smoothed: jax.Array


@dataclasses.dataclass(frozen=True)
class Curriculum:
  """Draw times from the clusters of a stage; `timesteps.Times` and `.Paced`.

  Their density is the process's own, cut to these clusters. In the last stage,
  which has no end, and with the order 'none' times are drawn as without a
  curriculum, bit for bit.

  Attributes:
    clusters: the N clusters, see `ops.clustering` for other than equal ones.
    order: 'easy_to_hard' begins with the noisiest cluster, 'hard_to_easy' with
      the cleanest, 'none' with all.
    patience: a stage ends after more than so many steps in a row without a
      smaller loss.
    smoothing: decay of the average of the losses that is compared; 0 compares
      the loss of the step.
    min_delta: what the loss has to fall by to count as smaller.
    stage_steps: length of all stages but the last, in place of `patience`.
    strata: also draw as many times from each of these intervals, as
      `strata.Stratified` does, or from what the stage has of them. The slices
      of those that it has nothing of go to the others.
  """

  clusters: Intervals = uniform(20)
  order: Literal['easy_to_hard', 'hard_to_easy', 'none'] = 'easy_to_hard'
  patience: int = 200
  smoothing: float = 0.0
  min_delta: float = 0.0
  stage_steps: int | None = None
  strata: Intervals | None = None

  def __post_init__(self):
    if self.order not in ('easy_to_hard', 'hard_to_easy', 'none'):
      raise ValueError(
        "expected `objective.times.order` 'easy_to_hard', 'hard_to_easy' or "
        f"'none', found {self.order!r}"
      )
    if not 0.0 <= self.smoothing < 1.0:
      raise ValueError(
        'expected `objective.times.smoothing` from 0 to below 1, found '
        f'{self.smoothing}'
      )
    if self.patience < 0 or self.min_delta < 0:
      raise ValueError(
        'expected `objective.times.patience` and `.min_delta` of 0 or more, '
        f'found {self.patience} and {self.min_delta}'
      )
    if self.stage_steps is not None and self.stage_steps < 1:
      raise ValueError(
        'expected `objective.times.stage_steps` of 1 or more, or None, found '
        f'{self.stage_steps}'
      )

  def init(self) -> Stage:
    """Return the first stage; without an order it is the last as well."""
    number = self.clusters.count if self.order == 'none' else 1
    return Stage(
      jnp.asarray(number, jnp.int32),
      jnp.asarray(jnp.inf, jnp.float32),
      jnp.zeros((), jnp.int32),
      jnp.asarray(jnp.nan, jnp.float32),
    )

  def refuse(self, process: Process, tasks: Intervals | None) -> None:
    """Accept tasks that the strata go with, see `strata.check_tasks`."""
    del process
    if self.strata is not None:
      check_tasks(self.strata, tasks, 'objective.times.strata')

  def support(self, stage: Stage) -> tuple[jax.Array, jax.Array]:
    """Return the first noise level of a stage, and the one after the last."""
    bounds = jnp.asarray(self.clusters.bounds, jnp.int32)
    if self.order == 'hard_to_easy':
      return bounds[0], bounds[stage.number]
    return bounds[self.clusters.count - stage.number], bounds[-1]

  def draw(
    self, state: Stage, keys: jax.Array, process: Process
  ) -> tuple[jax.Array, jax.Array]:
    """Return times [B] of the stage, and weights of 1.

    Raises:
      ValueError: the process has no times in a cluster or in what clusters and
        strata have in common, or the strata do not share the examples equally.
    """
    low, high = self.support(state)
    size = len(keys)
    if self.strata is None:
      path = 'objective.times.clusters'
      check_reachable(process, itertools.pairwise(self.clusters.bounds), path)
      low, high = jnp.full(size, low), jnp.full(size, high)
    else:
      path = 'objective.times.strata'
      check_slices(size, self.strata, path)
      both = sorted({*self.clusters.bounds, *self.strata.bounds})
      check_reachable(process, itertools.pairwise(both), f'{path} and clusters')
      first, last = self.strata.of(low), self.strata.of(high - 1)
      slot = first + slot_of(size, last - first + 1)
      own_low, own_high = self.strata.range_of(slot)
      low, high = jnp.maximum(low, own_low), jnp.minimum(high, own_high)
    return process.draw_within(keys, low, high), jnp.ones(size)

  def update(self, state: Stage, t: jax.Array, losses: jax.Array) -> Stage:
    """Return the state as it is: it goes by whole steps."""
    del t, losses
    return state

  def pace(self, state: Stage, loss: jax.Array) -> Stage:
    """Return the state after a step of loss f32 [].

    A loss that is not a number is no improvement, and leaves the average.
    """
    good = jnp.isfinite(loss)
    mixed = self.smoothing * state.smoothed + (1.0 - self.smoothing) * loss
    new = jnp.where(jnp.isnan(state.smoothed), loss, mixed)
    smoothed = jnp.where(good, new, state.smoothed)
    better = good & (smoothed < state.best - self.min_delta)
    best = jnp.where(better, smoothed, state.best)
    if self.stage_steps is None:
      counter = jnp.where(better, 0, state.counter + 1)
      over = counter > self.patience
    else:
      counter = state.counter + 1
      over = counter >= self.stage_steps
    here = Stage(state.number, best, counter, smoothed)
    # What the levels that come bring to the loss is no failure to improve.
    following = self.init()._replace(number=state.number + 1)
    on = over & (state.number < self.clusters.count)
    return jax.tree.map(lambda a, b: jnp.where(on, a, b), following, here)

  def report(self, state: Stage) -> dict[str, jax.Array]:
    """Return what a run logs: the stage as `curriculum_stage`, f32 []."""
    return {'curriculum_stage': state.number.astype(jnp.float32)}
