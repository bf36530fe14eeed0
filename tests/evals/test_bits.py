import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.evals.bits import bits_per_dim
from vfm_jax.ops.diffusion import Gaussian, unit_range


def test_bound_of_a_network_that_knows_the_sample():
  process = Gaussian(predicts='x0', variance='small')
  keys = jax.random.split(jax.random.key(0), 2)
  x0 = jnp.round(jax.random.uniform(keys[0], (2, 3, 3, 1)) * 255) / 127.5 - 1

  @functools.partial(jax.jit, static_argnums=2)
  def bound(x0, keys, restrict=None):
    return bits_per_dim(
      lambda x, t: x0, process, x0, keys, steps='20', restrict=restrict
    )

  got = bound(x0, keys, unit_range)
  np.testing.assert_allclose(got.bound[:, :-1], 0, atol=1e-5)
  np.testing.assert_allclose(got.x0_mse, 0, atol=1e-12)
  np.testing.assert_allclose(got.eps_mse, 0, atol=1e-6)
  assert np.all(got.bound[:, -1] > 0)
  np.testing.assert_allclose(got.total, got.bound.sum(1) + got.prior)
  one = bound(x0[1:], keys[1:])
  np.testing.assert_array_equal(one.bound[0], got.bound[1])


def test_recorded_noise_must_fit_the_steps():
  x0 = jnp.zeros((1, 2, 2, 1))
  with pytest.raises(ValueError, match='each of the 5 steps, found 4'):
    bits_per_dim(
      lambda x, t: x,
      Gaussian(),
      x0,
      steps='5',
      noise=jnp.zeros((4, 1, 2, 2, 1)),
    )
