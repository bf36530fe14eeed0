import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.guidance import cfg

X = jax.random.normal(jax.random.key(0), (3, 2, 2, 4))
T = jnp.array([10, 500, 900])
Y = jnp.array([0, 1, 2])
NULL = 9


def denoise(x, t, y):
  """Return [B, 2, 2, 8]: eps, then variance values, that tell labels apart."""
  label = y.reshape(-1, 1, 1, 1) + t.reshape(-1, 1, 1, 1) / 1000
  return jnp.concatenate([x * (1 + label), x - label], -1)


def outputs():
  return denoise(X, T, Y), denoise(X, T, jnp.full(3, NULL))


def test_moves_the_noise_and_leaves_the_variance():
  cond, null = outputs()
  got = cfg(denoise, Y, 4.0, NULL)(X, T)
  np.testing.assert_allclose(
    got[..., :4], (null + 4 * (cond - null))[..., :4], rtol=1e-5
  )
  np.testing.assert_array_equal(got[..., 4:], cond[..., 4:])


def test_scale_one_is_conditional():
  np.testing.assert_allclose(
    cfg(denoise, Y, 1.0, NULL)(X, T), outputs()[0], rtol=1e-5, atol=1e-6
  )


def test_three_channels_as_released():
  cond = outputs()[0]
  got = cfg(denoise, Y, 4.0, NULL, channels=3)(X, T)
  np.testing.assert_array_equal(got[..., 3:], cond[..., 3:])
  assert not np.allclose(got[..., 2], cond[..., 2])


@pytest.mark.parametrize('interval', [(500, 800), (100.0, 500.0)])
def test_guides_inside_an_interval(interval):
  cond = outputs()[0]
  got = cfg(denoise, Y, 4.0, NULL, interval=interval)(X, T)
  whole = cfg(denoise, Y, 4.0, NULL)(X, T)
  for i, inside in enumerate([False, True, False]):
    np.testing.assert_array_equal(got[i], (whole if inside else cond)[i])
