"""Draw the times of training from intervals of the noise levels.

Each satisfies `ops.timesteps.Times`, without a state.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from vfm_jax.ops.intervals import Intervals, uniform
from vfm_jax.ops.keys import fold
from vfm_jax.ops.process import NOISE_LEVELS, Process, check_reachable

# Number of the stream that the coins of `SoftInterval` come from; the times
# take the keys themselves, as they do elsewhere.
_COIN = 1


@dataclasses.dataclass(frozen=True)
class Stratified:
  """Draw as many times from each interval (ANT, arXiv:2306.00354, section 4).

  The first B / K examples of a (micro)batch take times of the cleanest
  interval, the next of the second one, and so on: the examples themselves come
  in random order. Losses are not weighed, so that intervals count alike,
  however long they are.

  Attributes:
    intervals: the K intervals.
  """

  intervals: Intervals

  def init(self) -> tuple[()]:
    """Return the empty state."""
    return ()

  def refuse(self, process: Process, tasks: Intervals | None) -> None:
    """Accept tasks that the intervals go with, see `check_tasks`."""
    del process
    check_tasks(self.intervals, tasks, 'objective.times.intervals')

  def draw(
    self, state: Any, keys: jax.Array, process: Process
  ) -> tuple[jax.Array, jax.Array]:
    """Return times [B], in equal slices of the intervals, and weights of 1.

    Raises:
      ValueError: the intervals do not share the examples equally, or the
        process has no times in one of them.
    """
    del state
    path = 'objective.times.intervals'
    check_slices(len(keys), self.intervals, path)
    check_reachable(process, itertools.pairwise(self.intervals.bounds), path)
    slots = slot_of(len(keys), self.intervals.count)
    low, high = self.intervals.range_of(slots)
    return process.draw_within(keys, low, high), jnp.ones(len(keys))

  def update(self, state: Any, t: jax.Array, losses: jax.Array) -> Any:
    """Return the empty state."""
    del t, losses
    return state


@dataclasses.dataclass(frozen=True)
class SoftInterval:
  """Draw mostly from one interval: an expert's own (MEME, arXiv:2306.04990).

  Each example has a coin of its own: with probability `own` its time is of the
  interval, otherwise of all levels. That the coin is the example's, and not
  the batch's, is our reading; the paper's code is not public.

  Attributes:
    interval: the number of the expert's interval, 0 the cleanest.
    intervals: those of all experts.
    own: how often the interval is kept to; 1 always.
  """

  interval: int
  intervals: Intervals = uniform(4)
  own: float = 1.0

  def __post_init__(self):
    if not 0 <= self.interval < self.intervals.count:
      raise ValueError(
        f'expected `interval` from 0 to {self.intervals.count - 1}, the '
        f"`intervals` of the expert's `times`, found {self.interval}"
      )
    if not 0.0 <= self.own <= 1.0:
      raise ValueError(
        f"expected `own` of the expert's `times` from 0 to 1, found {self.own}"
      )

  def init(self) -> tuple[()]:
    """Return the empty state."""
    return ()

  def draw(
    self, state: Any, keys: jax.Array, process: Process
  ) -> tuple[jax.Array, jax.Array]:
    """Return times [B], and weights of 1.

    Raises:
      ValueError: the process has no times in one of the intervals.
    """
    del state
    parts = itertools.pairwise(self.intervals.bounds)
    check_reachable(process, parts, 'times.intervals')
    own = jax.vmap(jax.random.uniform)(fold(keys, _COIN)) < self.own
    low, high = self.intervals.range_of(jnp.full(len(keys), self.interval))
    low, high = jnp.where(own, low, 0), jnp.where(own, high, NOISE_LEVELS)
    return process.draw_within(keys, low, high), jnp.ones(len(keys))

  def update(self, state: Any, t: jax.Array, losses: jax.Array) -> Any:
    """Return the empty state."""
    del t, losses
    return state


def slot_of(batch: int, count: int | jax.Array) -> jax.Array:
  """Return which of `count` equal slices each of `batch` positions is in.

  Where they are not equal, int32 [B] gives slices that differ by one position
  at most.
  """
  return jnp.arange(batch, dtype=jnp.int32) * count // batch


def check_slices(batch: int, intervals: Intervals, path: str) -> None:
  """Refuse a batch that intervals do not share equally.

  Args:
    batch: number of examples in a (micro)batch.
    intervals: the K intervals.
    path: where the config sets them, for the error.

  Raises:
    ValueError: names both numbers and what to change.
  """
  if batch % intervals.count:
    raise ValueError(
      f'expected microbatches of a multiple of {intervals.count} examples, one '
      f'slice for each interval of `{path}`, found {batch}; change '
      '`batch_size`, `accum` or the intervals'
    )


def check_tasks(
  intervals: Intervals, tasks: Intervals | None, path: str
) -> None:
  """Refuse tasks that hold parts of several intervals.

  Tasks are the intervals, parts of them or several whole ones: the mean over a
  task of another kind would be that of no density of times.

  Args:
    intervals: each with its equal share of the examples.
    tasks: None for one.
    path: where the config sets the intervals, for the error.

  Raises:
    ValueError: names the bounds of both.
  """
  if tasks is None:
    return
  ours, theirs = set(intervals.bounds), set(tasks.bounds)
  if not (ours <= theirs or theirs <= ours):
    raise ValueError(
      f'expected `objective.tasks` to be those of `{path}`, parts of them or '
      f'several whole ones, found the bounds {tasks.bounds} and '
      f'{intervals.bounds}'
    )
