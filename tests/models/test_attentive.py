import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.models.attentive import AttentiveClassifier, AttentivePooler

TOKENS = jax.random.normal(jax.random.key(0), (2, 6, 16))


def build(**kwargs):
  pooler = AttentivePooler(heads=2, **kwargs)
  model = AttentiveClassifier(3, pooler)
  return model, jax.jit(model.init)(jax.random.key(1), TOKENS)


@pytest.mark.parametrize(
  ('width', 'classes', 'fields', 'total'),
  [
    # The released counts of V-JEPA less a projection that is never applied.
    (1024, 400, dict(side='queries'), 13_007_248 - 1024 * 1025),
    (1280, 400, dict(side='queries'), 20_191_120 - 1280 * 1281),
    (1024, 174, dict(depth=4), 49_514_670),
  ],
)
def test_parameter_counts(width, classes, fields, total):
  model = AttentiveClassifier(classes, AttentivePooler(**fields))
  x = jax.ShapeDtypeStruct((1, 8, width), jnp.float32)
  params = jax.eval_shape(model.init, jax.random.key(0), x)['params']
  assert sum(p.size for p in jax.tree.leaves(params)) == total


@pytest.mark.parametrize(
  'side', [pytest.param('queries', marks=pytest.mark.slow), 'tokens']
)
def test_order_of_tokens_changes_nothing(side):
  """Thus the tokens of several clips may come in any order."""
  model, variables = build(depth=2, side=side)
  apply = jax.jit(model.apply)
  out = apply(variables, TOKENS)
  assert out.shape == (2, 3)
  shuffled = TOKENS[:, jnp.array([4, 5, 0, 1, 2, 3])]
  np.testing.assert_allclose(apply(variables, shuffled), out, atol=1e-5)


def test_residual_branches_start_smaller_with_each_layer():
  model = AttentivePooler(heads=2, depth=3)
  x = jnp.zeros((1, 2, 128))
  params = jax.jit(model.init)(jax.random.key(0), x)['params']
  for i, block in enumerate(
    (params, params['blocks_0'], params['blocks_1']), 1
  ):
    std = float(block['mlp']['fc2']['kernel'].std())
    assert std == pytest.approx(0.02 / np.sqrt(2 * i), rel=0.03)
    assert float(block['mlp']['fc1']['kernel'].std()) == pytest.approx(
      0.02, rel=0.03
    )


def test_settings_that_make_no_sense():
  x = jax.ShapeDtypeStruct((1, 2, 16), jnp.float32)

  def init(model):
    jax.eval_shape(model.init, jax.random.key(0), x)

  with pytest.raises(ValueError, match=r'reads one query, found.* 2'):
    init(AttentiveClassifier(3, AttentivePooler(queries=2)))
  with pytest.raises(ValueError, match=r'found width 16 and 3 heads'):
    init(AttentivePooler(heads=3))
