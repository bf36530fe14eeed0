"""Check that weights of feature networks are converted strictly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax import convert_features, trees
from vfm_jax.convert import ConversionError
from vfm_jax.models.efficientnet import EfficientNetLite0
from vfm_jax.models.inception import InceptionV3


@pytest.fixture(scope='module')
def lite0():
  x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  return jax.eval_shape(EfficientNetLite0().init, jax.random.key(0), x)[
    'params'
  ]


@pytest.fixture(scope='module')
def inception():
  x = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)
  return jax.eval_shape(InceptionV3().init, jax.random.key(0), x)['params']


def count(template):
  return sum(x.size for x in jax.tree.leaves(template))


def test_sizes(lite0, inception):
  # torch counts neither the moments of norms nor leaves the classifier out:
  # 1,281,000 of lite0, and 1,000 outputs of torchvision's Inception.
  assert count(lite0) == 4_652_008 - 1_281_000 + 2 * 21_008
  assert count(inception) == 23_834_568 - 2_049_000 + 2048 * 1008 + 2 * 17_216


def test_every_tensor_has_a_place(lite0, inception):
  for template, sources, convert in (
    (
      lite0,
      convert_features._efficientnet_sources,
      convert_features.from_efficientnet,
    ),
    (
      inception,
      convert_features._inception_sources,
      convert_features.from_inception,
    ),
  ):
    leaves = dict(trees.path_leaves(template))
    state = {}
    for path, source in sources(tuple(leaves), {}).items():
      shape = leaves[path].shape
      if len(shape) == 4:
        shape = shape[::-1][:2] + shape[:2]
      elif len(shape) == 3:
        shape = (shape[2], 1, *shape[:2])
      state[source.names[0]] = np.zeros(
        shape[::-1] if len(shape) == 2 else shape
      )
    state['x.num_batches_tracked'] = np.zeros(())
    params = convert(state, template)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, template)
    first = next(iter(state))
    with pytest.raises(ConversionError, match=f'missing: {first}'):
      convert({k: v for k, v in state.items() if k != first}, template)
    with pytest.raises(ConversionError, match='unused: AuxLogits'):
      convert({**state, 'AuxLogits.fc.weight': np.zeros(2)}, template)
    with pytest.raises(ConversionError, match=f'reshaped: {first}'):
      convert({**state, first: np.zeros((2, 3, 4, 5))}, template)
