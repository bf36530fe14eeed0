"""Check interpolant coefficients against calculus and each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.ops import paths

PATHS = [paths.Linear(), paths.GVP(), paths.VP()]
ids = [type(p).__name__ for p in PATHS]
T = jnp.array([0.05, 0.3, 0.55, 0.9])


@pytest.mark.parametrize('path', PATHS, ids=ids)
def test_derivatives_are_those_of_the_coefficients(path):
  for f, df in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
    np.testing.assert_allclose(df(T), jax.vmap(jax.grad(f))(T), rtol=1e-4)
  slope = path.d_alpha(T) / path.alpha(T)
  np.testing.assert_allclose(path.log_slope(T), slope, rtol=1e-5)
  weight = slope * path.sigma(T) ** 2 - path.sigma(T) * path.d_sigma(T)
  np.testing.assert_allclose(path.score_weight(T), weight, rtol=1e-4)


@pytest.mark.parametrize('path', PATHS, ids=ids)
def test_paths_end_in_data(path):
  assert path.alpha(jnp.float32(1)) == pytest.approx(1)
  assert path.sigma(jnp.float32(1)) == pytest.approx(0, abs=1e-6)
  at_noise = path.alpha(jnp.float32(0))
  assert (at_noise == 0) == path.from_pure_noise
  assert at_noise == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize('path', PATHS[1:], ids=ids[1:])
def test_variance_is_preserved(path):
  total = path.alpha(T) ** 2 + path.sigma(T) ** 2
  np.testing.assert_allclose(total, 1.0, rtol=1e-6)


@pytest.mark.parametrize('path', PATHS, ids=ids)
def test_conversions_round_trip(path):
  x, v = jax.random.normal(jax.random.key(0), (2, 4, 3, 3, 2))
  score = paths.score_from_velocity(path, v, x, T)
  back = paths.velocity_from_score(path, score, x, T)
  np.testing.assert_allclose(back, v, rtol=1e-3, atol=1e-4)
  noise = paths.noise_from_velocity(path, v, x, T)
  sigma = path.sigma(T)[:, None, None, None]
  np.testing.assert_allclose(-noise / sigma, score, rtol=1e-3, atol=1e-4)


def test_score_is_finite_at_pure_noise():
  x, t = jnp.ones((1, 2)), jnp.zeros(1)
  score = paths.score_from_velocity(paths.Linear(), 3 * x, x, t)
  np.testing.assert_array_equal(score, -x)


def test_diffusion_forms():
  path, t = paths.Linear(), jnp.array([0.25, 0.5])
  expected = {
    'constant': [2.0, 2.0],
    'sbdm': [6.0, 2.0],
    'sigma': [1.5, 1.0],
    'linear': [1.5, 1.0],
    'decreasing': [0.25 * (2**0.5 + 1) ** 2, 0.25],
    'increasing_decreasing': [1.0, 2.0],
  }
  assert set(expected) == set(paths.Form.__args__)
  for form, value in expected.items():
    found = paths.diffusion(path, t, form, norm=2.0)
    np.testing.assert_allclose(found, value, rtol=1e-5)


def test_unknown_form_is_named():
  with pytest.raises(ValueError, match=r"'sigma'.*found 'SBDM'"):
    paths.diffusion(paths.Linear(), T, 'SBDM')
