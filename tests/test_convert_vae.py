import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from vfm_jax import convert_vae
from vfm_jax.convert import ConversionError
from vfm_jax.models.autoencoder import AutoencoderKL

TINY = AutoencoderKL(widths=(8, 16), layers=1, groups=4)
CONFIG = {
  '_class_name': 'AutoencoderKL',
  'act_fn': 'silu',
  'block_out_channels': [8, 16],
  'down_block_types': ['DownEncoderBlock2D'] * 2,
  'up_block_types': ['UpDecoderBlock2D'] * 2,
  'in_channels': 3,
  'out_channels': 3,
  'latent_channels': 4,
  'layers_per_block': 1,
  'norm_num_groups': 4,
}
OLDER = {
  'to_q': 'query',
  'to_k': 'key',
  'to_v': 'value',
  'to_out.0': 'proj_attn',
}


@pytest.fixture(scope='module')
def params():
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda s: rng.standard_normal(s.shape).astype(np.float32), TINY.template()
  )


@pytest.fixture(scope='module')
def state(params):
  return convert_vae.to_vae(params)


def equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def older(state, *, convolution):
  out = {}
  for name, x in state.items():
    for new, old in OLDER.items():
      if f'.{new}.' in name:
        name = name.replace(f'.{new}.', f'.{old}.')
        x = x[:, :, None, None] if convolution and x.ndim == 2 else x
    out[name] = x
  return out


def test_round_trip_is_exact(params, state):
  equal(convert_vae.from_vae(state, TINY), params)
  kernel = params['encoder']['down_1_0']['conv1']['kernel']
  weight = state['encoder.down_blocks.1.resnets.0.conv1.weight']
  np.testing.assert_array_equal(weight[5, 3, 0, 2], kernel[0, 2, 3, 5])
  assert all(x.flags.c_contiguous for x in state.values())
  assert 'decoder.up_blocks.0.resnets.1.conv2.bias' in state
  assert 'decoder.up_blocks.1.resnets.0.conv_shortcut.weight' in state


@pytest.mark.parametrize('convolution', [False, True])
def test_older_names_of_attention(params, state, convolution):
  old = older(state, convolution=convolution)
  assert old.keys() != state.keys()
  equal(convert_vae.from_vae(old, TINY), params)


def test_every_fault_is_named(state):
  faulty = dict(state)
  del faulty['quant_conv.bias']
  faulty['loss.logvar'] = np.zeros(1)
  middle = 'decoder.mid_block.attentions.0'
  faulty[f'{middle}.query.bias'] = np.zeros(16)
  faulty[f'{middle}.to_k.weight'] = np.zeros((16, 8))
  faulty['encoder.conv_in.weight'] = np.zeros((8, 1, 3, 3))
  with pytest.raises(ConversionError) as e:
    convert_vae.from_vae(faulty, TINY)
  for text in (
    'missing: quant_conv.bias for quant_conv/bias',
    'unused: loss.logvar (1,)',
    f'unused: {middle}.query.bias (16,)',
    f'reshaped: {middle}.to_k.weight is (16, 8)',
    'reshaped: encoder.conv_in.weight is (8, 1, 3, 3)',
  ):
    assert text in str(e.value)
  ignore = {r'loss\..*': 'of training'}
  convert_vae.from_vae(
    {**state, 'loss.logvar': np.zeros(1)}, TINY, ignore=ignore
  )
  with pytest.raises(ConversionError, match='tensor is known for head/kernel'):
    convert_vae.to_vae({'head': {'kernel': np.zeros((2, 2))}})


def test_folder(params, state, tmp_path):
  folder = tmp_path / 'vae'
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(CONFIG))
  save_file(state, folder / 'diffusion_pytorch_model.safetensors')
  for path in (tmp_path, folder):
    loaded = convert_vae.load(path, dtype='bfloat16')
    assert loaded.model == TINY.clone(dtype='bfloat16')
    assert len(loaded.sha256) == 64
    equal(loaded.params, params)

  def write(**kw):
    (folder / 'config.json').write_text(json.dumps({**CONFIG, **kw}))

  write(scaling_factor=0.3, shift_factor=0.1, use_quant_conv=True)
  model = convert_vae.load(folder).model
  assert (model.scaling, model.shift) == (0.3, 0.1)
  for kw, text in (
    ({'act_fn': 'relu'}, "act_fn 'silu'"),
    ({'latents_mean': [0.0]}, 'latents_mean None'),
    ({'out_channels': 4}, 'as many out_channels'),
    ({'_class_name': 'AutoencoderTiny'}, "found 'AutoencoderTiny'"),
    ({'up_block_types': ['AttnUpDecoderBlock2D'] * 2}, "'AttnUpDecoder"),
    ({'use_quant_conv': False}, 'unused: quant_conv.bias'),
    ({'layers_per_block': 2}, 'missing: encoder.down_blocks.0.resnets.1'),
  ):
    write(**kw)
    with pytest.raises(ConversionError, match=re.escape(text)):
      convert_vae.load(folder)
