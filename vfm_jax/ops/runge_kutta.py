"""Integrate ordinary differential equations at fixed steps (Runge-Kutta).

A field is a function (y, t [B], i) -> dy/dt of a state y, a tree of arrays
[B, ...], where i int32 [] counts the evaluations from 0, for those that draw
random numbers. A solver is a frozen dataclass with

  integrate(field, y, times, *, path=False) -> y at times[-1]

where `times` are float64 [S] on the host, ascending or descending; with `path`
it returns the states at all of them, [S, B, ...], the first included.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from vfm_jax.ops.process import bcast

State = Any
Field = Callable[[State, jax.Array, jax.Array], State]


@runtime_checkable
class Solver(Protocol):
  """What `solvers` needs of a way to integrate."""

  def integrate(
    self, field: Field, y: State, times: np.ndarray, *, path: bool = False
  ) -> State:
    """Return y at the last time, or at all times."""
    ...


class Tableau(NamedTuple):
  """Hold an explicit Runge-Kutta method.

  Attributes:
    nodes: where in the step each stage stands.
    stages: weights of the earlier slopes in the state of each stage.
    weights: weights of the slopes in the result.
  """

  nodes: tuple[float, ...]
  stages: tuple[tuple[float, ...], ...]
  weights: tuple[float, ...]


TABLEAUS = {
  'euler': Tableau((0.0,), ((),), (1.0,)),
  'midpoint': Tableau((0.0, 1 / 2), ((), (1 / 2,)), (0.0, 1.0)),
  'heun': Tableau((0.0, 1.0), ((), (1.0,)), (1 / 2, 1 / 2)),
  'heun3': Tableau(
    (0.0, 1 / 3, 2 / 3), ((), (1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4)
  ),
  'rk4': Tableau(
    (0.0, 1 / 3, 2 / 3, 1.0),
    ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
    (1 / 8, 3 / 8, 3 / 8, 1 / 8),
  ),
}


@dataclasses.dataclass(frozen=True)
class Fixed:
  """Take one step from each time to the next, S - 1 in all.

  Attributes:
    method: of order 1 ('euler'), 2 ('midpoint', 'heun'), 3 ('heun3') or 4
      ('rk4', the 3/8 rule).
  """

  method: Literal['euler', 'midpoint', 'heun', 'heun3', 'rk4'] = 'heun'

  def __post_init__(self):
    if self.method not in TABLEAUS:
      raise ValueError(
        '`objective.sampling.sampler.solver.method` must be one of '
        f'{list(TABLEAUS)}, found {self.method!r}'
      )

  def integrate(self, field, y, times, *, path=False):
    """Return y at the last time, or at all times; see the module."""
    tableau = TABLEAUS[self.method]
    batch = jax.tree.leaves(y)[0].shape[:1]

    def step(y, inputs):
      t, dt, i = inputs
      t, dt = jnp.broadcast_to(t, batch), jnp.broadcast_to(dt, batch)
      slopes = find_slopes(field, tableau, y, t, dt, i)
      y = advance(y, dt, tableau.weights, slopes)
      return y, y if path else None

    inputs = (
      jnp.asarray(times[:-1], jnp.float32),
      jnp.asarray(np.diff(times), jnp.float32),
      jnp.arange(len(times) - 1) * len(tableau.nodes),
    )
    last, after = jax.lax.scan(step, y, inputs)
    if not path:
      return last
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), y, after)


def find_slopes(
  field: Field,
  tableau: Tableau,
  y: State,
  t: jax.Array,
  dt: jax.Array,
  i: jax.Array,
  first: State | None = None,
) -> State:
  """Return the slopes at the stages of a step, stacked in front.

  The stages are a loop, so that the field, a network, is compiled once and not
  for each of them.

  Args:
    field: what is integrated.
    tableau: the method.
    y: state at the start of the step.
    t: f32 [B] time there.
    dt: f32 [B] length of the step, negative for backward.
    i: int32 [] number of the next evaluation.
    first: the slope of y, where it is known from the step before.
  """
  count = len(tableau.nodes)
  if count == 1:
    return jax.tree.map(lambda a: a[None], field(y, t, i))
  slopes = jax.tree.map(lambda a: jnp.zeros((count, *a.shape), a.dtype), y)
  start = 0
  if first is not None:
    slopes = jax.tree.map(lambda a, b: a.at[0].set(b), slopes, first)
    start = 1
  nodes = jnp.asarray(tableau.nodes, jnp.float32)
  stages = np.zeros((count, count), np.float32)
  for n, weights in enumerate(tableau.stages):
    stages[n, : len(weights)] = weights
  stages = jnp.asarray(stages)

  def stage(n, slopes):
    state = advance(y, dt, stages[n], slopes)
    slope = field(state, t + nodes[n] * dt, i + n - start)
    return jax.tree.map(lambda a, b: a.at[n].set(b), slopes, slope)

  return jax.lax.fori_loop(start, count, stage, slopes)


def combine(weights: jax.Array | tuple[float, ...], slopes: State) -> State:
  """Return the weighted sum of stacked slopes."""
  weights = jnp.asarray(weights, jnp.float32)
  return jax.tree.map(lambda a: (bcast(weights, a) * a).sum(0), slopes)


def advance(
  y: State,
  dt: jax.Array,
  weights: jax.Array | tuple[float, ...],
  slopes: State,
) -> State:
  """Return y + dt (the weighted sum of stacked slopes), dt f32 [B]."""
  return jax.tree.map(
    lambda a, slope: a + bcast(dt, a) * slope, y, combine(weights, slopes)
  )
