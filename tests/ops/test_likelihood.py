import jax.numpy as jnp
import numpy as np

from vfm_jax.ops import likelihood


def test_divergence_of_normal_distributions():
  kl = likelihood.kl(jnp.float32(1.0), 0.0, 0.0, np.log(4.0))
  np.testing.assert_allclose(kl, np.log(2) + 2 / 8 - 0.5, rtol=1e-6)
  assert likelihood.kl(jnp.float32(2.0), 1.0, 2.0, 1.0) == 0


def test_probabilities_of_all_pixel_values_add_up_to_one():
  values = jnp.arange(256) / 127.5 - 1
  for mean, scale in ((0.1, 0.2), (-0.97, 0.05), (1.5, 0.3)):
    logs = likelihood.log_pixels(values, jnp.float32(mean), np.log(scale))
    np.testing.assert_allclose(jnp.exp(logs).sum(), 1, atol=1e-4)
  # The density times the bin's width, and the floor far away.
  log = likelihood.log_pixels(
    values[np.array([100, 255])], values[100], np.log(0.1)
  )
  height = 2 / 255 / (0.1 * np.sqrt(2 * np.pi))
  np.testing.assert_allclose(log, [np.log(height), np.log(1e-12)], rtol=1e-3)


def test_mean_keeps_the_examples():
  x = jnp.arange(12.0).reshape(2, 3, 2)
  np.testing.assert_array_equal(likelihood.mean(x), [2.5, 8.5])
