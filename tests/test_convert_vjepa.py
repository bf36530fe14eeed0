import json
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from vfm_jax import config, convert_vjepa, sharding, verbs
from vfm_jax.convert import ConversionError
from vfm_jax.models.attentive import AttentiveClassifier, AttentivePooler
from vfm_jax.models.encoders import VideoViT
from vfm_jax.models.vjepa import LatentPredictor
from vfm_jax.nn import transformer
from vfm_jax.objectives.latent import LatentPrediction

ROOT = pathlib.Path(__file__).parent
GOLDEN = ROOT / 'golden'
CFG = json.loads((GOLDEN / 'c_vjepa_step.json').read_text())['config']


@pytest.fixture(scope='module')
def state():
  return weights('c_vjepa_step')


def weights(case, prefix='w/'):
  with np.load(GOLDEN / f'{case}.npz') as file:
    return {
      k.removeprefix(prefix): file[k]
      for k in file.files
      if k.startswith(prefix)
    }


def objective(**kwargs):
  size = dict(
    width=CFG['embed_dim'], depth=CFG['depth'], frames=CFG['num_frames']
  )
  return LatentPrediction(
    encoder=VideoViT(
      heads=CFG['num_heads'],
      patch=CFG['patch_size'],
      image_size=CFG['img_size'],
      qkv_bias='full',
      **{**size, 'positions': 'sincos_3d', **kwargs},
    ),
    predictor=LatentPredictor(
      width=CFG['pred_dim'],
      depth=CFG['pred_depth'],
      heads=CFG['num_heads'],
      scan=kwargs.get('scan', False),
    ),
  )


def convert(state, obj=None):
  obj = obj or objective()
  side = CFG['img_size']
  video = jax.ShapeDtypeStruct((1, 8, side, side, 3), np.float32)
  params, extra = jax.eval_shape(obj.init, jax.random.key(0), {'video': video})
  return obj.converted(state, {**params, **extra})


def test_all_three_parts(state):
  params = convert(state)
  for part, name in (('encoder', 'encoder'), ('target', 'target_encoder')):
    block = params[part]['blocks_1']['attn']
    weight = state[f'{name}.blocks.1.attn.qkv.weight']
    np.testing.assert_array_equal(
      block['qkv']['kernel'][:, 2, 1], weight[96 + 12 : 96 + 24].T
    )
  tokens = [state[f'predictor.mask_tokens.{i}'].ravel() for i in (0, 1)]
  np.testing.assert_array_equal(params['predictor']['mask_tokens'], tokens)
  scanned = convert(state, objective(scan=True))
  back = transformer.unstack_blocks(scanned)
  jax.tree.map(np.testing.assert_array_equal, back, params)


def test_a_file_without_an_average_gives_its_encoder(state):
  state = {k: v for k, v in state.items() if 'target_encoder' not in k}
  params = convert(state)
  jax.tree.map(
    np.testing.assert_array_equal, params['target'], params['encoder']
  )


def test_what_does_not_fit_is_named(state):
  less = dict(state)
  del less['encoder.blocks.0.attn.qkv.bias']
  with pytest.raises(ConversionError, match=r'missing: encoder\.blocks\.0\.a'):
    convert(less)
  more = {**state, 'encoder.cls_token': np.zeros((1, 1, 48))}
  with pytest.raises(ConversionError, match=r'unused: encoder\.cls_token'):
    convert(more)
  name = 'predictor.predictor_proj.weight'
  other = {**state, name: state[name].T}
  with pytest.raises(ConversionError, match=rf'reshaped: {name}'):
    convert(other)
  third = {**state, 'predictor.mask_tokens.2': state['predictor.mask_tokens.1']}
  with pytest.raises(ConversionError, match=r'reshaped: .*mask_tokens\.2'):
    convert(third)


def test_position_tables_must_be_ours_unless_tokens_turn(state):
  with pytest.raises(
    ConversionError, match=r"not the table.*'sincos_3d_split'"
  ):
    convert(state, objective(positions='sincos_3d_split'))
  with pytest.raises(ConversionError, match=r'encoder\.pos_embed .*\(96, 48\)'):
    convert(state, objective(frames=12))
  convert(state, objective(positions='rope_3d_tiled'))


@pytest.mark.parametrize(('case', 'side'), [('c_vjepa_attentive', 'queries')])
def test_a_projection_without_use_is_left_out_of_probes(case, side):
  state = weights(case, 'w/d1.')
  assert any('xattn.proj' in name for name in state)
  model = AttentiveClassifier(6, AttentivePooler(heads=4, side=side))
  x = jax.ShapeDtypeStruct((1, 3, 48), np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)['params']
  params = convert_vjepa.from_probe(state, shapes)
  np.testing.assert_array_equal(
    params['linear']['kernel'], state['linear.weight'].T
  )
  del state['pooler.cross_attention_block.xattn.kv.bias']
  with pytest.raises(ConversionError, match=r'missing: .*xattn\.kv\.bias'):
    convert_vjepa.from_probe(state, shapes)


@pytest.mark.slow
def test_the_verb_writes_parameters_and_the_average(state, tmp_path):
  c = config.load(str(ROOT / 'recipes/tiny_vjepa.py'))
  encoder = dict(width=48, depth=3, heads=4, frames=8, positions='sincos_3d')
  c.objective.encoder.update(encoder)
  c.objective.predictor.update(
    width=36, depth=2, heads=4, positions='sincos_3d'
  )
  c.data.train.clip.frames = 8
  exp = config.build(c)
  save_file(state, tmp_path / 'file.safetensors')
  done = verbs.convert(
    exp, str(tmp_path), str(tmp_path / 'file.safetensors'), verify=True
  )
  assert done.num_params > 0
  mesh = sharding.make_mesh(exp.mesh)
  restored = exp.restore(str(tmp_path), mesh)
  want = convert(state)
  np.testing.assert_array_equal(
    restored.extra['target']['norm']['scale'], want['target']['norm']['scale']
  )
  used = exp.eval_params(restored)['encoder']['norm']['scale']
  np.testing.assert_array_equal(used, want['target']['norm']['scale'])
  assert np.any(used != restored.params['encoder']['norm']['scale'])
