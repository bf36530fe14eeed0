"""Check training times, losses and readings of interpolants."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.ops import interpolants, paths
from vfm_jax.ops.interpolants import Interpolant, interval
from vfm_jax.ops.process import NOISE_LEVELS, Process

PATHS = [paths.Linear(), paths.GVP(), paths.VP()]
ids = [type(p).__name__ for p in PATHS]
T = jnp.array([0.05, 0.3, 0.55, 0.9])
X0, EPS = jax.random.normal(jax.random.key(1), (2, 4, 3, 3, 2))


def oracle(process, x_t):
  """Return the output of a network that knows X0 and EPS."""
  if process.prediction == 'velocity':
    return process.target(X0, EPS, T)
  if process.prediction == 'noise':
    return EPS
  return -EPS / process.path.sigma(T)[:, None, None, None]


def every_process():
  for path in PATHS:
    for prediction in ('velocity', 'noise', 'score'):
      yield pytest.param(
        Interpolant(path, prediction), id=f'{type(path).__name__}-{prediction}'
      )


def test_it_is_a_process():
  assert isinstance(Interpolant(), Process)


@pytest.mark.parametrize('process', list(every_process()))
def test_the_oracle_has_no_loss_and_reads_back(process):
  x_t = process.corrupt(X0, EPS, T)
  output = oracle(process, x_t)
  loss, parts = process.loss(output, X0, EPS, x_t, T)
  assert loss.shape == (4,)
  np.testing.assert_allclose(loss, 0, atol=1e-9)
  np.testing.assert_allclose(parts['mse'], 0, atol=1e-9)
  p = process.predict(output, x_t, T)
  sigma = process.path.sigma(T)[:, None, None, None]
  close = functools.partial(
    np.testing.assert_allclose, rtol=1e-3, atol=2e-3, strict=True
  )
  close(p.x0, X0)
  close(p.eps, EPS)
  close(p.score, -EPS / sigma)
  close(p.v, process.target(X0, EPS, T))


def test_velocity_is_the_derivative_of_the_path():
  process = Interpolant(paths.GVP())
  step = 1e-2
  ahead = process.corrupt(X0, EPS, T + step)
  behind = process.corrupt(X0, EPS, T - step)
  slope = (ahead - behind) / (2 * step)
  np.testing.assert_allclose(slope, process.target(X0, EPS, T), atol=1e-3)


def test_weights():
  t, sigma, w = jnp.array([0.25]), 0.75, 3.0
  x0, eps = jnp.zeros((2, 1, 5))
  for weight, expected in (
    ('none', 1.0),
    ('velocity', (w / sigma) ** 2),
    ('likelihood', w / sigma**2),
  ):
    for prediction in ('noise', 'score'):
      process = Interpolant(prediction=prediction, weight=weight)
      output = jnp.ones_like(x0)
      if prediction == 'score':
        output = output / sigma
      loss, parts = process.loss(output, x0, eps, x0, t)
      np.testing.assert_allclose(loss, [expected], rtol=1e-6)
      np.testing.assert_allclose(parts['mse'], [1.0], rtol=1e-6)


def test_half_of_a_learned_variance_is_discarded():
  process = Interpolant()
  x_t = process.corrupt(X0, EPS, T)
  output = jax.random.normal(jax.random.key(2), X0.shape)
  both = jnp.concatenate([output, 1e9 * output], -1)
  one, two = (process.loss(o, X0, EPS, x_t, T)[0] for o in (output, both))
  np.testing.assert_array_equal(one, two)
  np.testing.assert_array_equal(process.predict(both, x_t, T).v, output)
  with pytest.raises(ValueError, match=r'2 or 4 channels.*found 6'):
    process.loss(jnp.tile(output, 3), X0, EPS, x_t, T)


def test_intervals():
  linear, vp = paths.Linear(), paths.VP()
  assert interval(linear, 'velocity', 0.1) == (0, 1)
  assert interval(linear, 'noise', 0.1) == (0.1, 0.9)
  assert interval(vp, 'velocity', 0.1) == (0, 0.9)
  sde = functools.partial(interval, sde=True)
  assert sde(linear, 'velocity', 0.1, form='sigma') == (0, 0.9)
  assert sde(linear, 'velocity', 0.1, form='sbdm') == (0.1, 0.9)
  last = functools.partial(sde, last_step_size=0.04)
  assert last(linear, 'velocity', 0.1, form='sbdm') == (0.1, 0.96)
  assert last(vp, 'noise', 0.1, form='sbdm') == (0, 0.96)
  # The last step is of SDEs alone.
  assert interval(vp, 'noise', 0.1, last_step_size=0.04) == (0, 0.9)


def test_margins():
  assert Interpolant().margins() == (0, 0)
  assert Interpolant(sample_eps=0.01).margins() == (0, 0.01)
  assert Interpolant(paths.VP()).margins() == (1e-5, 1e-3)
  given = Interpolant(paths.GVP(), 'noise', train_eps=0.02)
  assert given.margins() == (0.02, 1e-3)


def test_training_times_stay_in_the_interval():
  keys = jax.random.split(jax.random.key(0), 4096)
  process = Interpolant(prediction='noise', train_eps=0.2)
  t = process.draw_time(keys)
  assert t.dtype == jnp.float32
  assert 0.2 <= t.min() < 0.21
  assert 0.79 < t.max() <= 0.8
  np.testing.assert_array_equal(process.draw_time(keys[5:7]), t[5:7])
  density = functools.partial(interpolants.logit_normal, mean=-0.5, scale=0.8)
  t = Interpolant(density=density).draw_time(keys)
  logit = np.log(t / (1 - t))
  assert logit.mean() == pytest.approx(-0.5, abs=0.05)
  assert logit.std() == pytest.approx(0.8, abs=0.05)


def test_noise_levels():
  t = jnp.array([0.0, 0.25, 1.0])
  process = Interpolant()
  levels = process.noise_index(t)
  assert levels.dtype == jnp.int32
  np.testing.assert_array_equal(levels, [NOISE_LEVELS - 1, 749, 0])


def test_noise_levels_of_equal_snr():
  # A linear beta from 0.1 to 20 is what DDPM's steps sum up to.
  process = Interpolant(paths.VP(), index=interpolants.snr_index)
  t = jnp.array([0.1, 0.35, 0.6, 0.9])
  np.testing.assert_allclose(
    process.noise_index(t), interpolants.linear_index(None, t), atol=4
  )
  linear = Interpolant(index=interpolants.snr_index)
  levels = linear.noise_index(jnp.array([0.0, 0.5, 1.0]))
  np.testing.assert_array_equal(levels[jnp.array([0, 2])], [999, 0])
  abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
  closest = np.abs(np.log(abar / (1 - abar))).argmin()
  assert levels[1] == closest


def test_time_scale_is_for_the_network_alone():
  process = Interpolant(time_scale=1000.0)
  np.testing.assert_allclose(process.model_time(T), 1000 * T)
  np.testing.assert_array_equal(
    process.corrupt(X0, EPS, T), Interpolant().corrupt(X0, EPS, T)
  )


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    (dict(prediction='x0'), r"process\.prediction.*found 'x0'"),
    (dict(prediction='noise', weight='snr'), r"process\.weight.*found 'snr'"),
    (dict(weight='velocity'), r"objective\.process\.weight` must be 'none'"),
    (dict(train_eps=1e-3), r'process\.train_eps` must be None, found 0\.001'),
  ],
)
def test_contradictions_are_errors(kwargs, message):
  with pytest.raises(ValueError, match=message):
    Interpolant(**kwargs)


def test_infinite_diffusion_is_an_error():
  with pytest.raises(ValueError, match=r'process\.sample_eps'):
    Interpolant().sample_interval(sde=True, form='sbdm')
  safe = Interpolant(sample_eps=1e-3)
  assert safe.sample_interval(sde=True, form='sbdm')[0] == 1e-3
