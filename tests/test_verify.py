"""Check `convert --verify` from file to checkpoint, and what it finds."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from vfm_jax import checkpoint, config, convert, verbs, verify
from vfm_jax.objectives.encode import Encoder

RECIPE = pathlib.Path(__file__).parents[1] / 'configs/encoders.py'


def recipe():
  c = config.load(f'{RECIPE}:videomae_s')
  tiny = dict(width=16, depth=1, heads=2, patch=8, frames=2, image_size=16)
  c.objective.encoder.update(**tiny)
  c.objective.num_params = None
  c.data.train.clip.frames = 2
  c.data.train.transform.size = 16
  c.mesh.data = -1
  return c


@pytest.fixture(scope='module')
def exp():
  return config.build(recipe())


@pytest.fixture(scope='module')
def state(exp):
  rng = np.random.default_rng(0)
  sizes = {
    'patch_embed.proj.weight': (16, 3, 2, 8, 8),
    'patch_embed.proj.bias': (16,),
    'norm.weight': (16,),
    'norm.bias': (16,),
  }
  block = {
    'attn.q_bias': (16,),
    'attn.v_bias': (16,),
    'attn.qkv.weight': (48, 16),
    'attn.proj.weight': (16, 16),
    'attn.proj.bias': (16,),
    'mlp.fc1.weight': (64, 16),
    'mlp.fc1.bias': (64,),
    'mlp.fc2.weight': (16, 64),
    'mlp.fc2.bias': (16,),
  }
  block |= {f'norm{i}.{x}': (16,) for i in (1, 2) for x in ('weight', 'bias')}
  sizes |= {f'blocks.0.{name}': size for name, size in block.items()}
  tensors = {
    f'encoder.{name}': rng.normal(size=size).astype('f')
    for name, size in sizes.items()
  }
  return tensors | {'mask_token': np.zeros((1, 1, 8), np.float32)}


@pytest.fixture
def source(state, tmp_path):
  save_file(state, tmp_path / 'file.safetensors')
  return str(tmp_path / 'file.safetensors')


def test_a_file_becomes_a_verified_checkpoint_that_embeds(
  exp, state, source, tmp_path
):
  done = verbs.convert(exp, str(tmp_path), source, verify=True)
  assert [c.what for c in done.checks if not c.passed] == []
  text = verify.table(done.checks)
  assert f'{done.num_params:,}' in text
  assert '17 used, 1 left out' in text
  assert 'the decoder of pretraining embeds nothing  mask_token' in text
  assert '0 parameters differ' in text
  assert 'all finite' in text
  with pytest.raises(checkpoint.CheckpointError, match='holds step 0'):
    verbs.convert(exp, str(tmp_path), source)
  described = verbs.describe(exp, 1).data
  assert described['num_trainable'] == 0
  assert described['flops_per_step'] > 0


def test_a_wrong_number_of_parameters_is_not_written(exp, source, tmp_path):
  objective = dataclasses.replace(exp.objective, num_params=123)
  wrong = dataclasses.replace(exp, objective=objective)
  with pytest.raises(verify.VerificationError, match=r'parameters +123 '):
    verbs.convert(wrong, str(tmp_path), source, verify=True)
  assert not list((tmp_path / 'checkpoints').glob('[0-9]*'))


def test_constant_embeddings_are_not_kept(exp, state, tmp_path):
  state = state | {'encoder.norm.weight': np.zeros(16, np.float32)}
  save_file(state, tmp_path / 'dead.safetensors')
  with pytest.raises(verify.VerificationError, match='over clips') as e:
    verbs.convert(
      exp, str(tmp_path), str(tmp_path / 'dead.safetensors'), verify=True
    )
  assert 'over features' not in str(e.value).splitlines()[0]
  assert not (tmp_path / 'checkpoints').exists()


def test_weights_that_are_not_finite_are_found(exp, state):
  params = exp.objective.converted(state, exp.abstract_state.params)
  params['encoder']['norm']['bias'][0] = np.nan
  mesh = jax.make_mesh((1,) * 5, ('data', 'fsdp', 'tensor', 'seq', 'expert'))
  (check,) = verify._check_embeddings(exp, params, mesh)
  assert not check.passed
  assert 'not finite' in check.found


def test_a_tensor_without_a_use_is_lost():
  usage = convert.Usage({'x_layers/a[0]', 'x_layers/a[1]'}, {'b': 'a reason'})
  names = ['x_layers/a', 'b', 'c']
  checks = verify.check_weights(Encoder, {}, names, usage)
  assert [c.what for c in checks if not c.passed] == ['tensors']
  assert checks[1].found == '1 used, 1 left out, c'
