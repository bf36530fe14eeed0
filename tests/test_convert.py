import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import save_file

from vfm_jax import convert
from vfm_jax.models.encoders import VideoViT
from vfm_jax.nn import transformer

GOLDEN = pathlib.Path(__file__).parent / 'golden'
DECODER = {r'decoder\..*|encoder_to_decoder.*|mask_token': 'encoder only'}


@pytest.fixture(scope='module')
def state():
  with np.load(GOLDEN / 'a_videomae_pretrain.npz') as file:
    return {k[2:]: file[k] for k in file.files if k.startswith('w/')}


def template(scan=False):
  meta = json.loads((GOLDEN / 'a_videomae_pretrain.json').read_text())
  cfg = meta['config']
  model = VideoViT(
    width=cfg['encoder_embed_dim'],
    depth=cfg['encoder_depth'],
    heads=cfg['encoder_num_heads'],
    patch=cfg['patch_size'],
    scan=scan,
  )
  video = jax.ShapeDtypeStruct((1, 16, 32, 32, 3), jnp.float32)
  return {
    'encoder': jax.eval_shape(model.init, jax.random.key(0), video)['params']
  }


def test_encoder_of_a_pretraining_checkpoint(state):
  params = convert.from_videomae(state, template(), ignore=DECODER)
  block = params['encoder']['blocks_1']
  weight = state['encoder.blocks.1.attn.qkv.weight']
  qkv = block['attn']['qkv']['kernel']
  np.testing.assert_array_equal(qkv[:, 1, 2], weight[48:96].T[:, 24:36])
  bias = state['encoder.blocks.1.attn.v_bias']
  np.testing.assert_array_equal(block['attn']['v_bias'], bias)
  stem = state['encoder.patch_embed.proj.weight']
  kernel = params['encoder']['patch_embed']['kernel']
  at = ((1 * 8 + 3) * 8 + 5) * 3 + 2
  np.testing.assert_array_equal(kernel[at], stem[:, 2, 1, 3, 5])


def test_scanned_parameters(state):
  want = convert.from_videomae(state, template(), ignore=DECODER)
  got = convert.from_videomae(state, template(scan=True), ignore=DECODER)
  back = transformer.unstack_blocks(got)
  jax.tree.map(np.testing.assert_array_equal, back, want)


def test_missing_extra_and_reshaped_tensors_are_all_named(state):
  state = dict(state)
  del state['encoder.blocks.0.attn.q_bias']
  state['encoder.cls_token'] = np.zeros((1, 1, 48))
  state['encoder.norm.weight'] = np.zeros(47)
  state['encoder.blocks.2.attn.qkv.weight'] = np.zeros((48, 144))
  with pytest.raises(convert.ConversionError) as e:
    convert.from_videomae(state, template(), ignore=DECODER)
  text = str(e.value)
  assert 'missing: encoder.blocks.0.attn.q_bias for encoder/blocks_0' in text
  assert 'unused: encoder.cls_token (1, 1, 48)' in text
  assert 'reshaped: encoder.norm.weight is (47,)' in text
  assert 'reshaped: encoder.blocks.2.attn.qkv.weight is (48, 144)' in text


def test_a_bias_is_never_dropped(state):
  flat = traverse_util.flatten_dict(template(), sep='/')
  flat = {k: v for k, v in flat.items() if 'v_bias' not in k}
  bare = traverse_util.unflatten_dict(flat, sep='/')
  with pytest.raises(convert.ConversionError, match=r'unused: .*attn\.v_bias'):
    convert.from_videomae(state, bare, ignore=DECODER)


def test_an_unknown_parameter_is_refused(state):
  shape = jax.ShapeDtypeStruct((2,), jnp.float32)
  with pytest.raises(convert.ConversionError, match='known for encoder/cls'):
    convert.from_videomae(state, {'encoder': {'cls': shape}})


def test_read_checkpoint(tmp_path):
  state = {'a.weight': np.ones((2, 2), np.float32)}
  save_file(state, tmp_path / 'x.safetensors')
  np.savez(tmp_path / 'x.npz', **{'module.a.weight': state['a.weight']})
  for name in ('x.safetensors', 'x.npz'):
    got = convert.read_checkpoint(tmp_path / name)
    np.testing.assert_array_equal(got['a.weight'], state['a.weight'])
  with pytest.raises(ValueError, match=r'expected a checkpoint .*x\.h5'):
    convert.read_checkpoint(tmp_path / 'x.h5')
  with pytest.raises(ValueError, match=r"torch file .*'ema' of, found x\.npz"):
    convert.read_checkpoint(tmp_path / 'x.npz', entry='ema')
