import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax import convert, convert_videoprism, readers, trees
from vfm_jax.models.videoprism import VideoPrism
from vfm_jax.models.videoprism_clip import TextTower, VideoPrismClip
from vfm_jax.nn import transformer

TINY = dict(width=16, spatial_depth=2, temporal_depth=1, heads=2, mlp_width=24)
TINY |= dict(patch=4, frames=2, image_size=8)
Q_BIAS = (
  'params/spatial_encoder/transformers_stack/x_layers/self_attention/query/b'
)


def shapes(model):
  video = jax.ShapeDtypeStruct((1, 2, 8, 8, 3), jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), video)['params']


def released(template, stack=True):
  """Return random tensors, named as in a released file."""
  layers = {}
  rng = np.random.default_rng(0)
  # What tells the layout.
  names = ['params/x_layers/' if stack else 'params/x_layers_0/']
  if 'pooler' in template:
    names.append('params/vision_encoder/')
  unrolled = jax.eval_shape(transformer.unstack_blocks, template)
  flat = dict(trees.path_leaves(unrolled))
  found = convert_videoprism.sources(tuple(flat), dict.fromkeys(names))
  for path, source in found.items():
    shape = flat[path].shape
    for name in source.names:
      size = official(path, shape, name.partition('[')[0])
      layers[name] = rng.normal(size=size).astype('f')
  if not stack:
    return layers
  state = {}
  for name, x in layers.items():
    base, _, number = name.partition('[')
    state.setdefault(base, []).append(x)
    assert not number or int(number[:-1]) == len(state[base]) - 1
  return {
    name: np.stack(xs) if '/x_layers/' in name else xs[0]
    for name, xs in state.items()
  }


def official(path, shape, name):
  heads = 2
  if path.endswith('qkv/kernel'):
    return (shape[0], *shape[2:])
  if path.endswith('qkv/bias'):
    return shape[1:]
  if name.endswith('post/w'):
    return (shape[1], heads, shape[0] // heads)
  if name.endswith('/w'):
    return (shape[0], heads, shape[1] // heads)
  if name.endswith('/b') and 'post' not in name:
    return (heads, shape[0] // heads)
  return (1, *shape) if name.endswith('cls_emb') else shape


@pytest.fixture(scope='module')
def encoder():
  return VideoPrism(**TINY)


@pytest.fixture(scope='module')
def state(encoder):
  return released(shapes(encoder))


def test_stacked_and_single_layers_with_scanned_and_unrolled_blocks(encoder):
  template = shapes(encoder)
  stacked = released(template)
  single = released(template, stack=False)
  want = convert_videoprism.from_videoprism(stacked, template)
  got = convert_videoprism.from_videoprism(single, template)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  scanned = convert_videoprism.from_videoprism(
    stacked, shapes(encoder.clone(scan=True))
  )
  name = Q_BIAS.replace('query', 'value')
  np.testing.assert_array_equal(
    scanned['spatial']['blocks']['attn']['qkv']['bias'][:, 2], stacked[name]
  )
  # Stored scales are less one.
  np.testing.assert_array_equal(
    want['spatial']['norm']['scale'], 1 + stacked['params/spatial_ln/scale']
  )


def test_missing_extra_renamed_and_reshaped_tensors_are_all_named(
  encoder, state
):
  state = dict(state)
  state['params/spatial_ln/beta'] = state.pop('params/spatial_ln/bias')
  state['params/temporal_pos_emb/emb_var'] = np.zeros((3, 16))
  name = 'params/temporal_encoder/transformers_stack/x_layers/layer_norm/scale'
  del state[name]
  kernel = Q_BIAS.replace('/query/b', '/post/w')
  state[kernel] = state[kernel][..., :1]
  state['params/extra'] = np.zeros(2)
  with pytest.raises(convert.ConversionError) as e:
    convert_videoprism.from_videoprism(state, shapes(encoder))
  text = str(e.value)
  assert 'missing: params/spatial_ln/bias for spatial/norm/bias' in text
  assert 'unused: params/spatial_ln/beta (16,)' in text
  assert 'reshaped: params/temporal_pos_emb/emb_var is (3, 16)' in text
  assert f'missing: {name}[0] for temporal/blocks_0/norm1/scale' in text
  assert f'reshaped: {kernel}[1] is' in text
  assert 'unused: params/extra (2,)' in text


def test_no_layer_and_no_bias_is_dropped(encoder, state):
  shallow = shapes(encoder.clone(spatial_depth=1))
  with pytest.raises(convert.ConversionError, match=r'unused: .*\[1\]'):
    convert_videoprism.from_videoprism(state, shallow)
  bare = dict(state)
  del bare[Q_BIAS]
  with pytest.raises(convert.ConversionError, match=r'missing: .*query/b\[0\]'):
    convert_videoprism.from_videoprism(bare, shapes(encoder))
  template = shapes(encoder)
  for block in template['spatial'].values():
    if 'attn' in block:
      del block['attn']['qkv']['bias']
  with pytest.raises(convert.ConversionError, match=r'unused: .*query/b\[0\]'):
    convert_videoprism.from_videoprism(state, template)


def test_the_text_tower_may_be_left_out(encoder):
  text = TextTower(9, 16, 2, depth=1, norm_policy='primer_hybrid')
  whole = VideoPrismClip(encoder, text, auxiliary_depth=1)
  state = released(shapes(whole))
  stack = 'params/text_encoder/unimodal_transformer/x_layers'
  assert f'{stack}/ff_layer/post_layer_norm/scale' in state
  assert f'{stack}/pre_layer_norm/bias' in state
  videos = whole.clone(text=None)
  with pytest.raises(convert.ConversionError, match=r'unused: .*text_encoder'):
    convert_videoprism.from_videoprism(state, shapes(videos))
  with convert.recorded() as usage:
    params = readers.videoprism(state, shapes(videos), videos)
  assert set(params) == {'encoder', 'auxiliary', 'pooler'}
  assert set(usage.left_out.values()) == {'the text tower embeds no video'}
  both = readers.videoprism(state, shapes(whole), whole)
  np.testing.assert_array_equal(
    both['text']['class_token'], state['params/text_encoder/cls_emb'][0]
  )


def test_an_unknown_parameter_is_refused(state):
  shape = jax.ShapeDtypeStruct((2,), jnp.float32)
  with pytest.raises(convert.ConversionError, match='known for gate'):
    convert_videoprism.from_videoprism(state, {'gate': shape})
