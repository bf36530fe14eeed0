import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.nn import prism


def heads(value, n):
  return jnp.full((1, n, 1, 4), value)


def test_logits_are_capped():
  # Logits of 1e4 and 0 become 50 and 0; uncapped, the first takes all.
  k = jnp.concatenate([heads(50.0, 1), heads(0.0, 1)], 1)
  v = jnp.concatenate([heads(0.0, 1), heads(1.0, 1)], 1)
  q = heads(50.0, 1)
  capped = prism.capped_attention(q, k, v, cap=3.0)
  np.testing.assert_allclose(capped, 1 / (1 + np.exp(3.0)), rtol=1e-5)
  np.testing.assert_array_equal(prism.capped_attention(q, k, v), 0.0)


def test_a_query_that_sees_nothing_sees_all_alike():
  v = jnp.arange(3.0).reshape(1, 3, 1, 1)
  q = jnp.ones((1, 2, 1, 1))
  mask = jnp.array([[[[True, False, False], [False, False, False]]]])
  out = prism.capped_attention(q, v, v, mask=mask)
  np.testing.assert_allclose(out[0, :, 0, 0], [0.0, 1.0], rtol=1e-6)


@pytest.mark.parametrize(
  ('policy', 'norms'),
  [
    ('pre', ['norm1', 'norm2']),
    ('primer_hybrid', ['norm1', 'norm1_post', 'norm2', 'norm2_post']),
    ('post', ['norm1', 'norm2']),
    ('post_skip', ['norm1', 'norm2']),
  ],
)
def test_norm_policies(policy, norms):
  block = prism.PrismBlock(2, 8, norm_policy=policy)
  x = jax.random.normal(jax.random.key(0), (1, 3, 4))
  params = dict(jax.jit(block.init)(jax.random.key(1), x)['params'])
  assert sorted(set(params) - {'attn', 'mlp'}) == norms
  # Branches that add nothing before a norm: what is left says where it is.
  for name in ('attn', 'mlp'):
    params[name] = jax.tree.map(jnp.zeros_like, params[name])
  out = jax.jit(block.apply)({'params': params}, x)
  normal = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
  want = normal if policy == 'post_skip' else x
  np.testing.assert_allclose(out, want, atol=1e-5)


def test_the_pooler_needs_heads_that_divide():
  pooler = prism.AttentionPooler(heads=3, width=8)
  with pytest.raises(ValueError, match='width 8 and 3 heads'):
    pooler.init(jax.random.key(0), jnp.ones((1, 2, 4)))
