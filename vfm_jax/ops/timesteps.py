"""Define how the times of training are drawn, and draw them by their losses.

Others are in `ops.strata`, by example, and `ops.curriculum`, by stage.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from vfm_jax.ops.diffusion import Gaussian
from vfm_jax.ops.intervals import Intervals
from vfm_jax.ops.process import Process


@runtime_checkable
class Times(Protocol):
  """Draw the times of training, and learn from the losses at them."""

  def init(self) -> Any:
    """Return the state before the first step."""
    ...

  def draw(
    self, state: Any, keys: jax.Array, process: Process
  ) -> tuple[jax.Array, jax.Array]:
    """Return times [B] of a process, and the weights [B] of their losses.

    Where the times are drawn by strata, which one an example gets follows from
    its position in the batch that is given: equal slices, in order.

    Args:
      state: from `init`, `update` or `Paced.pace`.
      keys: one an example [B].
      process: what the times are of.
    """
    ...

  def update(self, state: Any, t: jax.Array, losses: jax.Array) -> Any:
    """Return the state after a microbatch: unweighted losses [B] at times."""
    ...


@runtime_checkable
class Paced(Protocol):
  """Optional: go by the loss of whole steps, as a curriculum does."""

  def pace(self, state: Any, loss: jax.Array) -> Any:
    """Return the state after a step, from the mean loss f32 [] of it all."""
    ...


@runtime_checkable
class Reports(Protocol):
  """Optional: log where a state is, such as the stage of a curriculum."""

  def report(self, state: Any) -> dict[str, jax.Array]:
    """Return f32 [] by name."""
    ...


@runtime_checkable
class Refuses(Protocol):
  """Optional: name what does not go with it, before anything runs."""

  def refuse(self, process: Process, tasks: Intervals | None) -> None:
    """Accept a process and the tasks that its losses are divided into.

    Raises:
      ValueError: they do not go together.
    """
    ...


class History(NamedTuple):
  """Hold the last losses of each step.

  Attributes:
    losses: [T, K], the oldest first; only the first `counts` are set.
    counts: int32 [T].
  """

  losses: jax.Array
  counts: jax.Array


@dataclasses.dataclass(frozen=True)
class LossAware:
  """Draw a step as often as its loss is large (arXiv:2102.09672, eq. 18).

  The probability of step t is proportional to sqrt(E[L_t^2]) over its last
  losses, mixed with a uniform one, and uniform until each step has all its
  losses. Losses are weighed by 1 / (T p_t), which keeps the mean what it is.

  Attributes:
    steps: number of steps T of the process.
    keep: number of losses K to remember of each step.
    uniform: share of uniform draws.
  """

  steps: int = 1000
  keep: int = 10
  uniform: float = 0.001

  def init(self) -> History:
    """Return a history without losses."""
    return History(
      jnp.zeros((self.steps, self.keep)), jnp.zeros(self.steps, jnp.int32)
    )

  def refuse(self, process: Process, tasks: Intervals | None) -> None:
    """Accept Gaussian diffusion of as many steps, as one task.

    The weights keep the mean over all steps what it is, and not that over the
    steps of a task.

    Raises:
      ValueError: names what was found.
    """
    if not isinstance(process, Gaussian) or process.steps != self.steps:
      raise ValueError(
        'LossAware times are steps: expected `objective.process` to be a '
        f'Gaussian of `objective.times.steps`, {self.steps}, found {process}'
      )
    if tasks is not None:
      raise ValueError(
        'LossAware times weigh losses so that their mean over all steps stays, '
        'which that of a task would not: expected `objective.tasks` None, '
        f'found {tasks.count}; take `ops.strata.Stratified`'
      )

  def probabilities(self, history: History) -> jax.Array:
    """Return how likely each step is [T]."""
    w = jnp.sqrt(jnp.square(history.losses).mean(-1))
    p = (1 - self.uniform) * w / w.sum() + self.uniform / self.steps
    full = jnp.all(history.counts == self.keep)
    return jnp.where(full, p, 1.0 / self.steps)

  def draw(
    self, history: History, keys: jax.Array, process: Process
  ) -> tuple[jax.Array, jax.Array]:
    """Return steps int32 [B] and the weights [B] of their losses."""
    del process
    p = self.probabilities(history)
    t = jax.vmap(lambda key: jax.random.categorical(key, jnp.log(p)))(keys)
    return t.astype(jnp.int32), self.importance(p, t)

  def importance(self, p: jax.Array, t: jax.Array) -> jax.Array:
    """Return the weights [B] of the losses of steps t [B]."""
    return 1.0 / (self.steps * p[t])

  def update(
    self, history: History, t: jax.Array, losses: jax.Array
  ) -> History:
    """Return the history with the unweighted losses [B], in their order."""

    def add(history, new):
      step, loss = new
      row, count = history.losses[step], history.counts[step]
      full = count == self.keep
      row = jnp.where(full, jnp.roll(row, -1), row)
      row = row.at[jnp.where(full, self.keep - 1, count)].set(loss)
      return History(
        history.losses.at[step].set(row),
        history.counts.at[step].set(jnp.minimum(count + 1, self.keep)),
      ), None

    return jax.lax.scan(add, history, (t, losses))[0]
