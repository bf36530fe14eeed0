import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.models.encoders import VideoViT
from vfm_jax.ops import positions

SMALL = dict(width=16, depth=2, heads=2, patch=4, frames=4, image_size=8)
VIDEO = jax.random.normal(jax.random.key(0), (2, 4, 8, 8, 3))


def count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def shapes(model, video=VIDEO):
  return jax.eval_shape(model.init, jax.random.key(0), video)['params']


@pytest.mark.parametrize(
  ('size', 'total'),
  [
    ('S', 21_879_936),
    ('B', 86_227_200),
    ('L', 303_860_736),
    ('H', 631_607_040),
    ('g', 1_011_610_752),
  ],
)
def test_parameter_counts(size, total):
  video = jax.ShapeDtypeStruct((1, 16, 224, 224, 3), jnp.float32)
  # Unrolled, the large ones are slow to trace.
  for scan in (False, True) if size == 'S' else (True,):
    assert count(shapes(VideoViT(size=size, scan=scan), video)) == total


@pytest.mark.parametrize(
  ('size', 'total'), [('S', 22_033_936), ('B', 86_534_800)]
)
def test_parameter_counts_of_finetuning(size, total):
  video = jax.ShapeDtypeStruct((1, 16, 224, 224, 3), jnp.float32)
  head = dict(pooling='mean', norm='pooled', num_classes=400)
  model = VideoViT(size=size, scan=True, **head)
  assert count(shapes(model, video)) == total


def test_parameter_paths():
  params = shapes(VideoViT(**SMALL))
  assert set(params) == {'patch_embed', 'blocks_0', 'blocks_1', 'norm'}
  assert params['blocks_0']['attn']['qkv']['kernel'].shape == (16, 3, 2, 8)


def test_hidden_tokens_never_reach_the_encoder():
  model = VideoViT(**SMALL)
  params = jax.jit(model.init)(jax.random.key(1), VIDEO)
  idx = jnp.array([[0, 3, 6], [1, 2, 7]])
  apply = jax.jit(model.apply)
  want = apply(params, VIDEO, idx)
  assert want.shape == (2, 3, 16)
  # Token 5 (t=1, h=0, w=1) is hidden in both.
  other = VIDEO.at[:, 2:, :4, 4:].set(99.0)
  np.testing.assert_array_equal(apply(params, other, idx), want)
  everything = jnp.tile(jnp.arange(8), (2, 1))
  np.testing.assert_allclose(
    apply(params, VIDEO, everything), apply(params, VIDEO), atol=1e-6
  )


def test_heads_pooling_and_taps():
  head = dict(num_classes=5, init_scheme='finetune', head_scale=0.5)
  model = VideoViT(**SMALL, pooling='mean', norm='pooled', **head)
  params = jax.jit(model.init)(jax.random.key(1), VIDEO)['params']
  assert {'fc_norm', 'head'} <= set(params)
  assert jax.eval_shape(model.apply, {'params': params}, VIDEO).shape == (2, 5)
  assert np.abs(params['head']['kernel']).std() < 0.01
  kernel = params['blocks_0']['mlp']['fc1']['kernel']
  assert float(kernel.std()) == pytest.approx(0.02, rel=0.1)

  @jax.jit
  def apply(params):
    given = {'params': params}, VIDEO
    taps = model.apply(*given, (1,), method='intermediate')
    return model.clone(num_classes=0).apply(*given), taps

  features, taps = apply(params)
  mean = np.asarray(taps[0]).mean(1)
  want = (mean - mean.mean(-1, keepdims=True)) / mean.std(-1, keepdims=True)
  np.testing.assert_allclose(features, want, atol=1e-3)
  first = VideoViT(**SMALL, pooling='first')
  tokens = VideoViT(**SMALL)
  params = jax.jit(tokens.init)(jax.random.key(1), VIDEO)
  both = jax.jit(lambda p: [m.apply(p, VIDEO) for m in (first, tokens)])
  one, every = both(params)
  np.testing.assert_allclose(one, every[:, 0], atol=1e-6)


@pytest.mark.slow
def test_other_sizes_and_images():
  model = VideoViT(**SMALL)
  params = model.init(jax.random.key(1), VIDEO)
  large = jnp.ones((1, 6, 12, 8, 3))
  assert model.apply(params, large).shape == (1, 3 * 3 * 2, 16)
  image = VIDEO[:, :1]
  got = model.apply(params, image)
  # The rows of t = 0, with the frame repeated to fill a tubelet.
  twice = jnp.repeat(image, 2, axis=1)
  np.testing.assert_array_equal(got, model.apply(params, twice))
  still = jnp.repeat(image, 4, axis=1)
  idx = jnp.tile(jnp.arange(4), (2, 1))
  np.testing.assert_allclose(got, model.apply(params, still, idx), atol=1e-6)
  flat = model.clone(image_positions='sincos_2d')
  assert np.abs(flat.apply(params, image) - got).max() > 1e-3


@pytest.mark.slow
def test_learned_positions():
  model = VideoViT(**SMALL, positions='learned')
  params = model.init(jax.random.key(1), VIDEO)
  assert params['params']['pos_embed'].shape == (8, 16)

  def grad(model):
    loss = lambda p: jnp.sin(model.apply(p, VIDEO)).sum()  # noqa: E731
    return np.abs(jax.grad(loss)(params)['params']['pos_embed']).max()

  assert grad(model) > 0
  assert grad(model.clone(train_positions=False)) == 0
  table = positions.fixed_table('flat_sinusoid', 16, (2, 2, 2))
  params['params']['pos_embed'] = jnp.asarray(table)
  got = model.apply(params, VIDEO)
  del params['params']['pos_embed']
  np.testing.assert_allclose(
    got, VideoViT(**SMALL).apply(params, VIDEO), atol=1e-6
  )


def test_bfloat16_computes_in_it_and_keeps_float32_parameters():
  model = VideoViT(**SMALL, dtype='bfloat16')
  out, variables = model.init_with_output(jax.random.key(1), VIDEO)
  assert out.dtype == jnp.bfloat16
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype('float32')}


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (dict(num_classes=3), '`encoder.pooling`'),
    (dict(norm='pooled'), "`encoder.norm` 'pooled' needs"),
    (dict(size='XL'), "`encoder.size`.*'XL'"),
    (dict(patch=3), 'rows.*multiple of 3, found 8'),
  ],
)
def test_errors(fields, message):
  with pytest.raises(ValueError, match=message):
    shapes(VideoViT(**{**SMALL, **fields}))
