import jax
import jax.numpy as jnp
import numpy as np

from vfm_jax.ops.diffusion import Gaussian
from vfm_jax.ops.timesteps import LossAware, Times


def test_draws_large_losses_often_and_keeps_the_mean():
  times = LossAware(steps=4, keep=2, uniform=0.1)
  assert isinstance(times, Times)
  history = times.init()
  t = jnp.array([0, 1, 2, 3, 0, 1, 2])
  history = times.update(history, t, jnp.array([9.0, 1, 1, 1, 3, 1, 1]))
  np.testing.assert_allclose(times.probabilities(history), 0.25)
  # The last missing loss, and one that pushes out the 9 of step 0.
  history = times.update(history, jnp.array([3, 0]), jnp.array([1.0, 3.0]))
  p = times.probabilities(history)
  np.testing.assert_allclose(p, 0.9 * np.array([3, 1, 1, 1]) / 6 + 0.025)
  drawn, weight = times.draw(
    history, jax.random.split(jax.random.key(0), 4000), Gaussian(steps=4)
  )
  share = np.bincount(drawn, minlength=4) / 4000
  np.testing.assert_allclose(share, p, atol=0.03)
  np.testing.assert_allclose(weight.mean(), 1.0, atol=0.05)
  np.testing.assert_allclose(weight, 0.25 / p[drawn], rtol=1e-6)
