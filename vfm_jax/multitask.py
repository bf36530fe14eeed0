"""Make one step of K tasks: from their losses or their gradients.

The tasks are the K entries of an objective's `LossOut.sums`; without a
combiner their losses are added. A task without examples in a batch is left out
of everything, as if there were one task less, and the auxiliary loss is added
to the result as it is. The methods are those that ANT (arXiv:2306.00354) uses
on intervals of noise levels; nothing here is about those.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from vfm_jax.gradients import Passes, Taken
from vfm_jax.ops import tasks as tasks_lib

PyTree = Any


class Combined(NamedTuple):
  """Hold what a combiner makes of a batch.

  Attributes:
    loss: f32 [], to report.
    taken: what the passes gave, with the gradient to go by.
    learned: gradient of the combiner's own parameters.
    state: its new state.
    metrics: f32 [] each, by name.
  """

  loss: jax.Array
  taken: Taken
  learned: PyTree
  state: PyTree
  metrics: dict[str, jax.Array]


@runtime_checkable
class Combiner(Protocol):
  """Turn K tasks into one gradient; frozen dataclasses satisfy it."""

  def init(self, tasks: int) -> tuple[PyTree, PyTree]:
    """Return its parameters, 'combine' among those trained, and its state.

    Args:
      tasks: number of tasks K.
    """
    ...

  def __call__(
    self,
    passes: Passes,
    learned: PyTree,
    state: PyTree,
    step: jax.Array,
    rng: jax.Array,
  ) -> Combined:
    """Return the gradient of a batch.

    Args:
      passes: what can be computed of it.
      learned: the combiner's parameters.
      state: its state.
      step: i32 [], number of finished steps.
      rng: a key of the step.
    """
    ...


@dataclasses.dataclass(frozen=True)
class UncertaintyWeighting:
  """Learn how uncertain each task is (Kendall et al., arXiv:1705.07115).

  The loss is sum_k (exp(-s_k) L_k / K + s_k) / 2 with a learned log-variance
  s_k, whose optimum is exp(s_k) = L_k / K. The s are the parameter
  `combine/log_variance` [K]; ANT lets them learn at 0.025 without decay: a
  `optim.Group('^combine/', lr_scale=0.025 / lr)`.

  One task with s = 0 has half the loss and the gradient of plain training.

  Attributes:
    start: the log-variances at first.
  """

  start: float = 0.0

  def init(self, tasks: int) -> tuple[PyTree, PyTree]:
    """Return the log-variances, and no state."""
    return {'log_variance': jnp.full(tasks, self.start, jnp.float32)}, {}

  def __call__(
    self,
    passes: Passes,
    learned: PyTree,
    state: PyTree,
    step: jax.Array,
    rng: jax.Array,
  ) -> Combined:
    """Return the gradient of the weighted losses and of the weights."""
    del step, rng
    s, n = learned['log_variance'], passes.num_present
    weights = tasks_lib.uncertainty_weights(s)
    taken = passes.weighted(weights / n)

    def total(s):
      terms = tasks_lib.uncertainty_terms(taken.losses / n, s)
      return jnp.sum(jnp.where(passes.present, terms, 0.0))

    loss, grad = jax.value_and_grad(total)(s)
    return Combined(
      loss + taken.aux,
      taken,
      {'log_variance': grad},
      state,
      _by_task('weight', weights),
    )


@dataclasses.dataclass(frozen=True)
class PCGrad:
  """Project conflicts out of the tasks' gradients (Yu et al., 2001.06782).

  Algorithm 1: from each task's gradient, what opposes the gradient of another
  task is taken away, one task after the other in random order; the results
  are added. The order follows from the seed and the step.

  Attributes:
    against: 'others' projects on the other tasks; 'all' also on the task
      itself, which can only matter after other projections, as ANT's code
      does (kept for comparisons).
    mean: divide by the number of tasks, as ANT does.
  """

  against: Literal['others', 'all'] = 'others'
  mean: bool = False

  def init(self, tasks: int) -> tuple[PyTree, PyTree]:
    """Return nothing: there is nothing to learn or to remember."""
    del tasks
    return {}, {}

  def __call__(
    self,
    passes: Passes,
    learned: PyTree,
    state: PyTree,
    step: jax.Array,
    rng: jax.Array,
  ) -> Combined:
    """Return the sum of the projected gradients."""
    del step
    taken, grads = passes.separate()
    products = tasks_lib.gram(grads)
    tasks = len(passes.counts)
    order = jax.vmap(lambda key: jax.random.permutation(key, tasks))(
      jax.random.split(rng, tasks)
    )
    scale = 1.0 / passes.num_present if self.mean else 1.0
    weights = scale * tasks_lib.projected(products, order, self.against)
    taken = _add(taken, tasks_lib.mix(weights, grads))
    pairs = passes.num_present * (passes.num_present - 1)
    return Combined(
      scale * jnp.sum(taken.losses) + taken.aux,
      taken,
      learned,
      state,
      {'conflicts': jnp.sum(products < 0) / jnp.maximum(pairs, 1.0)},
    )


@dataclasses.dataclass(frozen=True)
class Nash:
  """Let the tasks bargain for the step (Nash-MTL, Navon et al., 2202.01017).

  The loss is sum_k alpha_k L_k / K, where G alpha = 1 / alpha for the products
  G of the tasks' gradients, so that each task gains alike in relative terms.
  The alpha are found anew every few steps, of which all others cost one
  backward pass, and are 1 before. Where there is no solution, as for gradients
  that vanish, oppose each other or are not finite, the alpha stay until the
  next time, and `nash_kept` counts it; so do those of tasks without examples.

  With one task there is nothing to bargain for: training is plain. What
  `describe` counts is a step that bargains.

  Attributes:
    every: steps from one bargain to the next; the first is at step 0.
    clip_norm: bound on the norm of the whole gradient, with that of auxiliary
      losses, as ANT has it for this method alone; None: off.
    iterations: Newton steps of the solution.
  """

  every: int = 25
  clip_norm: float | None = 1.0
  iterations: int = 50

  def __post_init__(self):
    """Refuse settings that mean nothing."""
    if self.every < 1 or self.iterations < 1:
      raise ValueError(
        'expected `combine.every` and `combine.iterations` of at least 1, '
        f'found {self.every} and {self.iterations}'
      )
    if self.clip_norm is not None and self.clip_norm <= 0:
      raise ValueError(
        f'expected `combine.clip_norm` above 0 or None, found {self.clip_norm}'
      )

  def init(self, tasks: int) -> tuple[PyTree, PyTree]:
    """Return no parameters; the alpha and the number of failures as state."""
    weights = jnp.ones(tasks, jnp.float32)
    return {}, {'weights': weights, 'kept': jnp.zeros((), jnp.int32)}

  def __call__(
    self,
    passes: Passes,
    learned: PyTree,
    state: PyTree,
    step: jax.Array,
    rng: jax.Array,
  ) -> Combined:
    """Return the weighted gradient, clipped."""
    del rng
    old = state['weights']
    if len(old) == 1:
      taken = passes.weighted(old)
      return Combined(taken.losses[0] + taken.aux, taken, learned, state, {})

    def bargain():
      taken, grads = passes.separate()
      alpha, solved = self._solve(tasks_lib.gram(grads), passes.present, old)
      taken = _add(taken, tasks_lib.mix(alpha / passes.num_present, grads))
      return taken, alpha, state['kept'] + ~solved

    def keep():
      return passes.weighted(old / passes.num_present), old, state['kept']

    taken, alpha, kept = jax.lax.cond(step % self.every == 0, bargain, keep)
    if self.clip_norm is not None:
      clip = optax.clip_by_global_norm(self.clip_norm)
      taken = taken.replace(grads=clip.update(taken.grads, clip.init({}))[0])
    loss = jnp.sum(alpha * taken.losses) / passes.num_present + taken.aux
    return Combined(
      loss,
      taken,
      learned,
      {'weights': alpha, 'kept': kept},
      {**_by_task('weight', alpha), 'nash_kept': kept.astype(jnp.float32)},
    )

  def _solve(self, products, present, old):
    """Return alpha [K] among those present, and whether it was found."""
    both = present[:, None] & present
    alone = jnp.eye(len(old), dtype=products.dtype)
    alpha, solved = tasks_lib.nash(
      jnp.where(both, products, alone), self.iterations
    )
    return jnp.where(present & solved, alpha, old), solved


def _add(taken: Taken, grads: PyTree) -> Taken:
  """Return what was taken, with further gradients."""
  return taken.replace(grads=jax.tree.map(jnp.add, taken.grads, grads))


def _by_task(name: str, values: jax.Array) -> dict[str, jax.Array]:
  return {f'{name}_task{k}': values[k] for k in range(len(values))}
