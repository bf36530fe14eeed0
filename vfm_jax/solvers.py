"""Sample along interpolants: ODE, SDE and likelihood (SiT, arXiv:2401.08740).

Time runs from 0, noise, to 1, data. A sampler calls `denoise(x, t)` with t
f32 [B] and reads the output through the process; guidance wraps `denoise`, see
`guidance.cfg`. All may be jitted: fixed steps are one `lax.scan`, adaptive ones
one `lax.while_loop`. Each sample has its own key, so what comes out for it does
not depend on the batch that it is drawn in.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vfm_jax.ops import paths
from vfm_jax.ops.dopri5 import Dopri5
from vfm_jax.ops.interpolants import Interpolant
from vfm_jax.ops.keys import fold
from vfm_jax.ops.process import bcast
from vfm_jax.ops.runge_kutta import Solver
from vfm_jax.samplers import Denoise, stream

LastStep = Literal['mean', 'euler', 'tweedie', 'none']

ADAPTIVE = Dopri5()


def ode(
  denoise: Denoise,
  process: Interpolant,
  x: jax.Array,
  keys: jax.Array | None = None,
  *,
  solver: Solver = ADAPTIVE,
  num_steps: int = 50,
  reverse: bool = False,
  interval: tuple[float, float] | None = None,
  path: bool = False,
) -> jax.Array:
  """Follow the velocity, dx/dt = v(x, t) (SiT, eq. 2).

  Args:
    denoise: the network, with its labels and guidance.
    process: that it was trained with.
    x: f32 [B, ..., C] noise, see `samplers.initial_noise`; data in reverse.
    keys: not used, since nothing is drawn; all samplers take them.
    solver: `ops.runge_kutta.Fixed` or `ops.dopri5.Dopri5`.
    num_steps: number of times, both ends included: a fixed solver takes one
      step less. An adaptive one only reports at them.
    reverse: go from data to noise.
    interval: first and last time, in the order in which they are passed. None
      takes `process.sample_interval()`, the other way around in reverse.
    path: return the states at all times.

  Returns:
    f32 [B, ..., C], or with `path` [num_steps, B, ..., C], x included.
  """
  del keys
  times = _times(process, num_steps, reverse, interval)

  def field(x, t, i):
    del i
    return process.velocity(denoise(x, t), x, t)

  return solver.integrate(field, x.astype(jnp.float32), times, path=path)


def sde(
  denoise: Denoise,
  process: Interpolant,
  x: jax.Array,
  keys: jax.Array | None,
  *,
  method: Literal['euler', 'heun'] = 'euler',
  num_steps: int = 250,
  form: paths.Form = 'sigma',
  norm: float = 1.0,
  last_step: LastStep = 'mean',
  last_step_size: float = 0.04,
  noise: jax.Array | None = None,
  path: bool = False,
) -> jax.Array:
  """Follow dX = (v + w s) dt + sqrt(2 w) dW (SiT, eq. 5 and section 2.4).

  `num_steps` - 1 steps over evenly spaced times, then a last one without noise
  from 1 - `last_step_size` to the data, where the score blows up. One call of
  the network gives both v and s.

  Args:
    denoise: the network, with its labels and guidance.
    process: that it was trained with.
    x: f32 [B, ..., C] noise.
    keys: one key a sample [B]; None where `noise` is given.
    method: 'euler' (Euler-Maruyama); or 'heun', which adds the noise first and
      then takes a Heun step of the drift, with two calls of the network.
    num_steps: number of steps, the last one included.
    form: the diffusion w, see `ops.paths.diffusion`.
    norm: its size.
    last_step: 'mean' follows the drift, 'euler' the velocity, 'tweedie' jumps
      to the expected data, (x + sigma^2 s) / alpha, and 'none' stays.
    last_step_size: length of the last step; 0 with 'none'.
    noise: [num_steps - 1, B, ..., C] what to add in place of draws.
    path: return the states after all steps.

  Returns:
    f32 [B, ..., C], or with `path` [num_steps, B, ..., C], x not included.

  Raises:
    ValueError: an option is unknown, or the diffusion is infinite at the start.
  """
  if method not in ('euler', 'heun') or last_step not in LastStep.__args__:
    raise ValueError(
      "`objective.sampling.sampler` needs `method` 'euler' or 'heun' and "
      f'`last_step` one of {LastStep.__args__}, found {method!r} and '
      f'{last_step!r}'
    )
  if num_steps < 2 or (noise is not None and len(noise) != num_steps - 1):
    raise ValueError(
      'expected `objective.sampling.sampler.num_steps` of at least 2 and '
      f'`noise` for one step less, found {num_steps} and '
      f'{None if noise is None else len(noise)}'
    )
  if last_step == 'none':
    last_step_size = 0.0
  t0, t1 = process.sample_interval(
    sde=True, form=form, last_step_size=last_step_size
  )
  times = np.linspace(t0, t1, num_steps)
  dt = float(times[1] - times[0])

  def terms(x, t):
    """Return drift, velocity and score."""
    output = denoise(x, t)
    v, score = process.velocity(output, x, t), process.score(output, x, t)
    w = paths.diffusion(process.path, t, form, norm)
    return v + bcast(w, x) * score, v, score

  def step(x, inputs):
    t, i, z = inputs
    z = stream(keys, i, x.shape[1:]) if z is None else z
    t = jnp.full(x.shape[:1], t)
    w = paths.diffusion(process.path, t, form, norm)
    kick = bcast(jnp.sqrt(2.0 * w * dt), x) * z
    if method == 'euler':
      x = x + dt * terms(x, t)[0] + kick
    else:
      x = x + kick
      slope = terms(x, t)[0]
      x = x + 0.5 * dt * (slope + terms(x + dt * slope, t + dt)[0])
    return x, x if path else None

  inputs = (
    jnp.asarray(times[:-1], jnp.float32),
    jnp.arange(num_steps - 1) + 1,  # 0 is the initial noise
    noise,
  )
  states: Any
  x, states = jax.lax.scan(step, x.astype(jnp.float32), inputs)
  if last_step != 'none':
    t = jnp.full(x.shape[:1], t1, jnp.float32)
    drift, v, score = terms(x, t)
    if last_step == 'tweedie':
      alpha, sigma = process.path.alpha(t), process.path.sigma(t)
      x = (x + bcast(jnp.square(sigma), x) * score) / bcast(alpha, x)
    else:
      x = x + last_step_size * (drift if last_step == 'mean' else v)
  return jnp.concatenate([states, x[None]]) if path else x


class Likelihood(NamedTuple):
  """Hold what `log_likelihood` finds.

  Attributes:
    logp: f32 [B] log-density of the data, in nats.
    bits_per_dim: f32 [B] -logp in bits, over the number of entries.
    z: f32 [B, ..., C] the noise that the data comes from.
  """

  logp: jax.Array
  bits_per_dim: jax.Array
  z: jax.Array


def log_likelihood(
  denoise: Denoise,
  process: Interpolant,
  x: jax.Array,
  keys: jax.Array,
  *,
  solver: Solver = ADAPTIVE,
  num_steps: int = 50,
  interval: tuple[float, float] | None = None,
  probe: Callable[..., jax.Array] | None = None,
) -> Likelihood:
  """Estimate the log-density of data by the change of variables.

  log p(x) = log N(z) - int div v dt along the path of `ode` (arXiv:2011.13456,
  eqs. 39 and 40), with the divergence z^T (dv/dx) z of a random sign z
  (Hutchinson). `denoise` must not be guided: a guided velocity has no density
  to speak of.

  Args:
    denoise: the network, with its labels.
    process: that it was trained with.
    x: f32 [B, ..., C] data.
    keys: one key a sample [B].
    solver: as in `ode`.
    num_steps: as in `ode`.
    interval: as in `ode`, from data to noise.
    probe: (keys [B], i int32 [], shape) -> signs f32 [B, *shape] of evaluation
      i. None draws one probe a sample and keeps it (as in FFJORD), which leaves
      the field smooth enough for adaptive steps; `draw_signs` draws one an
      evaluation, as SiT does.
  """
  times = _times(process, num_steps, True, interval)
  x = x.astype(jnp.float32)
  shape, size = x.shape[1:], math.prod(x.shape[1:])
  if probe is None:
    probe = lambda keys, i, shape: draw_signs(keys, 0, shape)  # noqa: E731

  def field(state, t, i):
    x, _ = state
    signs = probe(keys, i, shape)
    v, pull = jax.vjp(lambda x: process.velocity(denoise(x, t), x, t), x)
    (gradient,) = pull(signs)
    return v, _total(gradient * signs)

  # Time falls, so the integral comes out with the sign of -div.
  z, negative = solver.integrate(field, (x, jnp.zeros(x.shape[:1])), times)
  prior = -0.5 * (_total(jnp.square(z)) + size * math.log(2.0 * math.pi))
  logp = prior + negative
  return Likelihood(logp, -logp / (size * math.log(2.0)), z)


def draw_signs(
  keys: jax.Array, i: int | jax.Array, shape: tuple[int, ...]
) -> jax.Array:
  """Return random signs f32 [B, *shape], stream i of each key [B]."""
  draw = lambda k: jax.random.rademacher(k, shape, jnp.float32)  # noqa: E731
  return jax.vmap(draw)(fold(keys, i))


def _times(process, num_steps, reverse, interval) -> np.ndarray:
  """Return float64 [num_steps] evenly spaced times."""
  if num_steps < 2:
    raise ValueError(
      'expected `objective.sampling.sampler.num_steps` of at least 2, found '
      f'{num_steps}'
    )
  if interval is None:
    interval = process.sample_interval()
    interval = interval[::-1] if reverse else interval
  first, last = interval
  return np.linspace(first, last, num_steps)


def _total(x):
  """Sum all but the first dimension."""
  return x.sum(tuple(range(1, x.ndim)))
