import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.models.predictors import PixelDecoder

SHAPE = dict(features=6, grid=(2, 2, 2), built_grid=(2, 2, 2))
X = jax.random.normal(jax.random.key(0), (1, 3, 8))
VISIBLE = jnp.array([[0, 2, 5]])
TARGET = jnp.array([[1, 3, 4, 6, 7]])


@pytest.fixture(scope='module')
def variables():
  model = PixelDecoder(width=16, depth=2, heads=2)
  make = functools.partial(model.init, **SHAPE)
  return jax.jit(make)(jax.random.key(1), X, VISIBLE, TARGET)


def test_permuted_targets_permute_the_output(variables):
  model = PixelDecoder(width=16, depth=2, heads=2)
  apply = jax.jit(functools.partial(model.apply, **SHAPE))
  out = apply(variables, X, VISIBLE, TARGET)
  assert out.shape == (1, 5, 6)
  order = jnp.array([3, 0, 4, 1, 2])
  other = apply(variables, X, VISIBLE, TARGET[:, order])
  np.testing.assert_allclose(other, out[:, order], atol=1e-5)


def test_initialisation(variables):
  params = variables['params']
  assert np.abs(params['mask_token']).max() <= 0.02
  assert set(params['embed']) == {'kernel'}
  assert np.abs(params['embed']['kernel']).max() <= 1 / np.sqrt(8)
