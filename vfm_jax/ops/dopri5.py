"""Integrate ordinary differential equations at steps chosen by their error."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vfm_jax.ops import runge_kutta as rk
from vfm_jax.ops.process import bcast

# Dormand & Prince 1980, with the error and midpoint of Shampine 1986. The
# last stage stands at the result, and is the first one of the next step.
_DOPRI5 = rk.Tableau(
  (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
  (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
  ),
  (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
)
_DOPRI5_ERROR = tuple(
  np.subtract(
    _DOPRI5.weights,
    (
      1951 / 21600,
      0.0,
      22642 / 50085,
      451 / 720,
      -12231 / 42400,
      649 / 6300,
      1 / 60,
    ),
  ).tolist()
)
_DOPRI5_MIDDLE = (
  6025192743 / 60171106304,
  0.0,
  51252292925 / 130801643196,
  -2691868925 / 90256659456,
  187940372067 / 3189068634112,
  -1776094331 / 39487288512,
  11237099 / 470086768,
)


@dataclasses.dataclass(frozen=True)
class Dopri5:
  """Choose steps by the error of a pair of orders 5 and 4 (Dormand-Prince).

  First step, error and control are those of torchdiffeq, the solver of SiT
  (Hairer, Norsett & Wanner, Solving ODEs I, section II.4), with two
  differences. No step goes past the end, where a path may be undefined. And by
  default each sample has steps of its own, so what becomes of it does not
  depend on the rest of its batch; each evaluation still takes the whole batch,
  and those go on until the slowest sample has arrived. `norm='batch'` takes
  one step for all, by the root mean square of the error over the whole batch,
  as torchdiffeq does.

  A sample that has not arrived after `max_steps`, or whose step underflows, is
  NaN. `times` between the ends are read off a quartic and cost no evaluation.

  Attributes:
    rtol: error of a step over the state that is allowed.
    atol: error allowed on top of it.
    norm: over what the error is averaged, the 'sample' or the 'batch'. The
      largest over the leaves of the state counts.
    max_steps: most steps to try.
  """

  rtol: float = 1e-3
  atol: float = 1e-6
  norm: Literal['sample', 'batch'] = 'sample'
  max_steps: int = 10_000

  def __post_init__(self):
    if self.norm not in ('sample', 'batch'):
      raise ValueError(
        "`objective.sampling.sampler.solver.norm` must be 'sample' or 'batch', "
        f'found {self.norm!r}'
      )

  def integrate(self, field, y, times, *, path=False):
    """Return y at the last time, or at all times; see `ops.runge_kutta`."""
    sign = 1.0 if times[-1] > times[0] else -1.0
    # Times are measured from the start, upwards; the end is hit exactly.
    clock = _Clock(
      start=float(times[0]),
      sign=sign,
      marks=jnp.asarray(sign * (times - times[0]), jnp.float32)[:, None],
    )
    slope, step = self._start(field, y, clock)
    states = jax.tree.map(
      lambda a: jnp.broadcast_to(a, (len(times), *a.shape)), y if path else ()
    )
    carry = _Carry(y, slope, jnp.zeros_like(step), step, jnp.int32(2), states)
    most = 2 + self.max_steps * (len(_DOPRI5.nodes) - 1)
    carry = jax.lax.while_loop(
      lambda c: clock.going(c).any() & (c.evaluations < most),
      lambda c: self._attempt(field, c, clock, path),
      carry,
    )
    if path:
      return _where(clock.marks <= carry.elapsed, carry.states, jnp.nan)
    return _where(carry.elapsed >= clock.span, carry.y, jnp.nan)

  def _attempt(self, field, c, clock, path):
    """Try a step of each sample, and keep those that are accurate."""
    step = jnp.minimum(c.step, clock.span - c.elapsed)
    dt = clock.sign * step
    slopes = rk.find_slopes(
      field, _DOPRI5, c.y, clock.at(c.elapsed), dt, c.evaluations, first=c.slope
    )
    y = rk.advance(c.y, dt, _DOPRI5.weights, slopes)
    error = rk.combine(_DOPRI5_ERROR, slopes)
    error = jax.tree.map(lambda a: bcast(dt, a) * a, error)
    ratio = self._norm(error, c.y, y)
    ratio = jnp.where(jnp.isfinite(ratio), ratio, jnp.inf)
    going = clock.going(c)
    accept = going & (ratio <= 1.0)
    smallest = jnp.where(ratio < 1.0, 1.0, 0.2)
    factor = jnp.clip(0.9 * ratio**-0.2, smallest, 10.0)
    arrives = c.step >= clock.span - c.elapsed
    reached = jnp.where(arrives, clock.span, c.elapsed + step)
    reached = jnp.where(accept, reached, c.elapsed)
    states = c.states
    if path:
      inside = (clock.marks > c.elapsed) & (clock.marks <= reached)
      place = (clock.marks - c.elapsed) / jnp.where(accept, step, 1.0)
      between = _interpolate(c.y, y, dt, slopes, place)
      states = _where(inside, between, states)
    return _Carry(
      y=_where(accept, y, c.y),
      slope=_where(accept, _at(slopes, -1), c.slope),
      elapsed=reached,
      step=jnp.where(going, step * factor, c.step),
      evaluations=c.evaluations + len(_DOPRI5.nodes) - 1,
      states=states,
    )

  def _start(self, field, y, clock):
    """Return the first slope, and a step on which it hardly changes [B]."""

    def evaluate(n, carry):
      # First at the start, then a trial step ahead; a loop, see `find_slopes`.
      slope, ahead, trial = carry
      ahead = field(
        rk.advance(y, clock.sign * trial, (1.0,), _stack(slope)),
        clock.at(trial),
        n,
      )
      slope = jax.tree.map(lambda a, b: jnp.where(n == 0, a, b), ahead, slope)
      size, speed = self._norm(y, y, y), self._norm(slope, y, y)
      tiny = (size < 1e-5) | (speed < 1e-5)
      trial = jnp.where(tiny, 1e-6, 0.01 * size / jnp.where(tiny, 1.0, speed))
      return slope, ahead, jnp.minimum(trial, clock.span)

    zeros = jax.tree.map(jnp.zeros_like, y)
    still = jnp.zeros(jax.tree.leaves(y)[0].shape[:1], jnp.float32)
    slope, ahead, trial = jax.lax.fori_loop(
      0, 2, evaluate, (zeros, zeros, still)
    )
    change = jax.tree.map(jnp.subtract, ahead, slope)
    bend = jnp.maximum(
      self._norm(slope, y, y), self._norm(change, y, y) / trial
    )
    straight = bend <= 1e-15
    step = jnp.where(
      straight,
      jnp.maximum(1e-6, 1e-3 * trial),
      (0.01 / jnp.where(straight, 1.0, bend)) ** 0.2,
    )
    return slope, jnp.minimum(100.0 * trial, step)

  def _norm(self, x, y, other):
    """Return the size [B] of x in units of the error allowed for y."""

    def leaf(x, y, other):
      allowed = self.atol + self.rtol * jnp.maximum(jnp.abs(y), jnp.abs(other))
      square = jnp.square(x / allowed)
      if self.norm == 'batch':
        return jnp.full(y.shape[:1], jnp.sqrt(square.mean()))
      return jnp.sqrt(square.mean(tuple(range(1, y.ndim))))

    sizes = jax.tree.leaves(jax.tree.map(leaf, x, y, other))
    return jnp.stack(sizes).max(0)


class _Clock(NamedTuple):
  """Count time from the start, upwards whichever way it runs.

  Attributes:
    start: the first time.
    sign: 1 or -1, which way time runs.
    marks: f32 [S, 1] time from the start of all times.
  """

  start: float
  sign: float
  marks: jax.Array

  @property
  def span(self):
    return self.marks[-1, 0]

  def at(self, elapsed):
    return self.start + self.sign * elapsed

  def going(self, c):
    # False as well where the step is NaN, or too short to tell.
    return (c.elapsed < self.span) & (c.elapsed + c.step > c.elapsed)


class _Carry(NamedTuple):
  """Hold what an attempt passes on; `elapsed` and `step` are f32 [B]."""

  y: rk.State
  slope: rk.State
  elapsed: jax.Array
  step: jax.Array
  evaluations: jax.Array
  states: rk.State


def _stack(slope):
  return jax.tree.map(lambda a: a[None], slope)


def _at(slopes, n):
  """Return the slope of stage n."""
  return jax.tree.map(lambda a: a[n], slopes)


def _where(condition, new, old):
  """Choose by a condition [B], or [S, B] for stacked states."""
  old = jax.tree.map(lambda a: old, new) if isinstance(old, float) else old
  return jax.tree.map(
    lambda a, b: jnp.where(bcast(condition, a), a, b), new, old
  )


def _interpolate(y0, y1, dt, slopes, place):
  """Evaluate the quartic through both ends, their slopes, and the middle.

  It is the cubic through the ends and slopes, plus what moves its middle to
  where the method has it.

  Args:
    y0: state at the start of the step.
    y1: at its end.
    dt: the step [B].
    slopes: of all stages of `_DOPRI5`.
    place: [S, B] from 0, the start, to 1, the end.
  """
  middle = rk.advance(y0, dt, _DOPRI5_MIDDLE, slopes)

  def leaf(a, b, slope_a, slope_b, middle):
    x, h = bcast(place, a[None]), bcast(dt, a)
    rise, da, db = b - a, h * slope_a, h * slope_b
    cubic = a + x * rise
    cubic += x * (1 - x) * ((1 - x) * (da - rise) - x * (db - rise))
    off = middle - (a + 0.5 * rise + 0.125 * (da - db))
    return cubic + 16.0 * jnp.square(x * (1 - x)) * off

  return jax.tree.map(leaf, y0, y1, _at(slopes, 0), _at(slopes, -1), middle)
