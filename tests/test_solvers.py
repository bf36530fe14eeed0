"""Check sampling along interpolants against a target that is known."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax import guidance, samplers, solvers
from vfm_jax.objectives.denoise import Denoise
from vfm_jax.ops import paths
from vfm_jax.ops.dopri5 import Dopri5
from vfm_jax.ops.interpolants import Interpolant
from vfm_jax.ops.runge_kutta import Fixed
from vfm_jax.sampling import Sampling

MEAN, STD = 1.5, 0.5


def known(path):
  """Return the velocity field of data ~ N(MEAN, STD^2)."""

  def denoise(x, t):
    c = [f(t)[:, None] for f in (path.alpha, path.d_alpha)]
    s = [f(t)[:, None] for f in (path.sigma, path.d_sigma)]
    variance = (c[0] * STD) ** 2 + s[0] ** 2
    slope = (c[0] * c[1] * STD**2 + s[0] * s[1]) / variance
    return c[1] * MEAN + slope * (x - c[0] * MEAN)

  return denoise


def keys(n):
  return jax.random.split(jax.random.key(0), n)


def error(solver, num_steps, path):
  """Return how far z lands from MEAN + STD z."""
  z = jnp.linspace(-2, 2, 5)[:, None]
  run = functools.partial(
    solvers.ode,
    known(path),
    Interpolant(path),
    solver=solver,
    num_steps=num_steps,
  )
  out = jax.jit(run)(z)
  return float(jnp.abs(out - (MEAN + STD * z)).max())


@pytest.mark.parametrize(('method', 'order'), [('euler', 1), ('heun', 2)])
def test_error_of_the_ode_falls_with_the_step(method, order):
  coarse, fine = (error(Fixed(method), 1 + n, paths.Linear()) for n in (20, 40))
  assert np.log2(coarse / fine) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize('path', [paths.Linear(), paths.GVP()])
def test_adaptive_steps_reach_the_target(path):
  assert error(Dopri5(rtol=1e-5), 2, path) < 1e-3


def test_there_is_one_step_less_than_times():
  count = []

  def denoise(x, t):
    jax.debug.callback(lambda t: count.append(float(t)), t[0])
    return x

  x = jnp.ones((2, 3))
  run = functools.partial(solvers.ode, denoise, Interpolant(), x)
  states = run(solver=Fixed('euler'), num_steps=5, path=True)
  jax.effects_barrier()
  assert sorted(count) == [0.0, 0.25, 0.5, 0.75]
  np.testing.assert_allclose(states[:, 0, 0], 1.25 ** np.arange(5), rtol=1e-6)


def test_reverse_undoes_forward():
  path, x = paths.VP(), jnp.array([[1.0], [2.0]])
  run = functools.partial(solvers.ode, known(path), Interpolant(path))

  @jax.jit
  def there_and_back(x):
    z = run(x, reverse=True, solver=Dopri5(rtol=1e-5))
    return run(z, solver=Dopri5(rtol=1e-5))

  back = there_and_back(x)
  np.testing.assert_allclose(back, x, atol=1e-3)


@pytest.mark.parametrize(
  ('method', 'form', 'last_step'),
  [
    ('euler', 'sigma', 'mean'),
    ('euler', 'linear', 'euler'),
    ('heun', 'decreasing', 'tweedie'),
    ('heun', 'sbdm', 'mean'),
  ],
)
def test_every_diffusion_has_the_same_marginal(method, form, last_step):
  n, path = 4096, paths.Linear()
  process = Interpolant(path, sample_eps=1e-2)
  x = samplers.initial_noise(keys(n), (1,))
  run = functools.partial(
    solvers.sde,
    known(path),
    process,
    method=method,
    form=form,
    last_step=last_step,
    num_steps=150,
  )
  out = jax.jit(run)(x, keys=keys(n))
  assert out.mean() == pytest.approx(MEAN, abs=0.04)
  spread = STD
  if last_step == 'tweedie':  # the expectation of the data, from t = 0.96
    spread *= (1 + (0.04 / (0.96 * STD)) ** 2) ** -0.5
  assert out.std() == pytest.approx(spread, rel=0.05)


def test_samples_do_not_depend_on_their_batch():
  path = paths.Linear()
  x = samplers.initial_noise(keys(5), (2,))
  run = jax.jit(
    functools.partial(solvers.sde, known(path), Interpolant(path), num_steps=6)
  )
  np.testing.assert_allclose(
    run(x[2:4], keys(5)[2:4]), run(x, keys(5))[2:4], rtol=1e-6
  )


def test_without_last_step_the_state_stays():
  path, x = paths.GVP(), jnp.ones((2, 1))
  run = functools.partial(
    solvers.sde, known(path), Interpolant(path, sample_eps=0.1), x, keys(2)
  )
  states = run(last_step='none', num_steps=4, path=True)
  assert len(states) == 4
  np.testing.assert_array_equal(states[-1], states[-2])


def test_recorded_noise_is_added_by_step():
  noise = jnp.array([1.0, 2.0, 3.0]).reshape(3, 1, 1) * jnp.ones((3, 2, 1))
  states = solvers.sde(
    lambda x, t: jnp.zeros_like(x),
    Interpolant(),
    jnp.zeros((2, 1)),
    None,
    form='constant',
    norm=0.25,
    last_step='none',
    noise=noise,
    num_steps=4,
    path=True,
  )
  dt = 1 / 3
  expected = (0.5 * dt) ** 0.5 * 1.0
  np.testing.assert_allclose(states[0], expected, rtol=1e-5)
  # With v = 0 the score of the straight path is -x / (1 - t).
  slope = -0.25 * expected / (1 - dt)
  expected = expected + dt * slope + (0.5 * dt) ** 0.5 * 2.0
  np.testing.assert_allclose(states[1], expected, rtol=1e-5)


def test_likelihood_of_a_known_target():
  x = jnp.array([[0.3, 1.1, 2.0], [1.5, 1.4, 0.9]])
  exact = -0.5 * (((x - MEAN) / STD) ** 2 + np.log(2 * np.pi * STD**2)).sum(1)
  for solver in (Dopri5(rtol=1e-5), Fixed('rk4')):
    run = functools.partial(
      solvers.log_likelihood,
      known(paths.Linear()),
      Interpolant(),
      solver=solver,
      num_steps=40,
    )
    found = jax.jit(run)(x, keys(2))
    # The divergence of a diagonal field is exact for any signs.
    np.testing.assert_allclose(found.logp, exact, atol=2e-3)
    np.testing.assert_allclose(found.z, (x - MEAN) / STD, atol=2e-3)
    bits = -exact / (3 * np.log(2))
    np.testing.assert_allclose(found.bits_per_dim, bits, atol=2e-3)


def test_probes_are_unbiased_signs():
  signs = solvers.draw_signs(keys(512), 3, (4,))
  assert set(np.unique(signs)) == {-1.0, 1.0}
  assert abs(signs.mean()) < 0.1
  again = solvers.draw_signs(keys(512)[7:9], 3, (4,))
  np.testing.assert_array_equal(again, signs[7:9])
  assert (solvers.draw_signs(keys(512), 4, (4,)) != signs).any()


class Doubling(nn.Module):
  """Predict a multiple of the input, with a variance that means nothing."""

  label_dropout: float = 0.0
  channels: int = 1

  @nn.compact
  def __call__(self, x, t, y=None, *, drop=None, tau=None, keys=None):
    rate = self.param('rate', nn.initializers.ones, ())
    return jnp.concatenate([rate * x, 1e9 * x], -1)


def test_the_objective_samples_with_it():
  objective = Denoise(
    Doubling(),
    Interpolant(),
    label=None,
    sampling=Sampling(functools.partial(solvers.ode, solver=Dopri5(1e-5))),
  )
  batch = {'image': jnp.zeros((3, 2, 2, 1)), 'row': jnp.arange(3)}
  params, _ = objective.init(jax.random.key(0), batch)
  loss = jax.jit(functools.partial(objective.loss, train=True))
  out = loss(params, {}, batch, jax.random.key(1))
  # x_t = (1 - t) eps and v = -eps, so that the error is (2 - t) eps.
  assert 0.5 < out.sums[0] / out.counts[0] < 8
  x = samplers.initial_noise(keys(3), (2, 2, 1))
  draw = jax.jit(
    lambda keys: objective.sampling.draw(
      lambda x, t, y: objective.denoise(params, x, t),
      objective.process,
      keys,
      (2, 2, 1),
      None,
      None,
    )
  )
  drawn = draw(keys(3))
  np.testing.assert_allclose(drawn, np.e * x, rtol=1e-3)


def test_guidance_of_three_channels_and_a_discarded_variance():
  def denoise(x, t, y):
    velocity = jnp.broadcast_to(y[:, None].astype(jnp.float32), x.shape)
    return jnp.concatenate([velocity, 1e9 * velocity], -1)

  y, x = jnp.array([1, 2]), jnp.zeros((2, 4))
  guided = guidance.cfg(denoise, y, 3.0, 0, channels=3)
  run = jax.jit(
    lambda x: solvers.ode(
      guided, Interpolant(), x, solver=Fixed('euler'), num_steps=3
    )
  )
  expected = [[3, 3, 3, 1], [6, 6, 6, 2]]
  np.testing.assert_allclose(run(x), expected, rtol=1e-6)


def test_wrong_options_are_named():
  x, field = jnp.zeros((2, 1)), known(paths.Linear())
  with pytest.raises(ValueError, match=r"`method`.*found 'rk4' and 'mean'"):
    solvers.sde(field, Interpolant(), x, keys(2), method='rk4')
  with pytest.raises(ValueError, match="found 'euler' and 'Mean'"):
    solvers.sde(field, Interpolant(), x, keys(2), last_step='Mean')
  noise = jnp.zeros((5, 2, 1))
  with pytest.raises(ValueError, match='one step less, found 5 and 5'):
    solvers.sde(field, Interpolant(), x, None, num_steps=5, noise=noise)
  with pytest.raises(ValueError, match='num_steps` of at least 2, found 1'):
    solvers.ode(field, Interpolant(), x, num_steps=1)
