import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released

from vfm_jax import convert, convert_dmp
from vfm_jax.models.prompts import dmp
from vfm_jax.nn import adaln, transformer

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'g_dmp_add_topk'
CONFIG = json.loads(GOLDEN.with_suffix('.json').read_text())['config']
MODEL = released.dit(
  CONFIG, dmp(CONFIG['num_tokens'], depth=CONFIG['pt_depth'])
)


@pytest.fixture(scope='module')
def state():
  with np.load(GOLDEN.with_suffix('.npz')) as file:
    return {k[2:]: file[k] for k in file.files if k.startswith('w/')}


def template(model=MODEL):
  x = jnp.zeros((1, model.input_size, model.input_size, 4))
  make = lambda: model.init(jax.random.key(0), x, jnp.zeros(1))  # noqa: E731
  return jax.eval_shape(make)['params']


@pytest.mark.parametrize('scan', [False, True])
def test_round_trip_is_exact(state, scan):
  model = MODEL.clone(scan=scan)
  params = convert_dmp.from_dmp(state, template(model), model)
  back = convert_dmp.to_dmp(params, model)
  assert back.keys() == state.keys()
  for name, tensor in state.items():
    np.testing.assert_allclose(
      back[name], tensor, rtol=0, atol=1e-6 * (name == 'pos_embed')
    )


def test_places_of_entries(state):
  params = convert_dmp.from_dmp(state, template(), MODEL)
  gate = params['prepare_hook']
  assert gate['gate']['kernel'][5, 3] == state['gate.weight'][3, 5]
  np.testing.assert_array_equal(
    gate['depth_scale'], state['gate.weight'][:, -1]
  )
  for i in range(3):
    got = params[f'blocks_{i}']['token_hook']['prompt_tokens']
    want = state['prompt_embeddings'][i] if i < 2 else np.zeros((16, 48))
    np.testing.assert_array_equal(got, want)


def test_prompts_without_a_gate(state):
  bare = {k: v for k, v in state.items() if k not in ('gate.bias', 'w_noise')}
  del bare['gate.weight']
  model = MODEL.clone(hooks=dmp(16, kind='PT', depth=2))
  params = convert_dmp.from_dmp(bare, template(model), model)
  assert convert_dmp.to_dmp(params, model).keys() == bare.keys()
  with pytest.raises(convert.ConversionError, match=r'missing: gate\.weight'):
    convert_dmp.from_dmp(bare, template(), MODEL)
  with pytest.raises(convert.ConversionError, match='unused: w_noise'):
    convert_dmp.from_dmp(state, template(model), model)


def test_faults_are_named(state):
  def read(model=MODEL, **changes):
    changed = {**state, **changes}
    wanted = {k: v for k, v in changed.items() if v is not None}
    return convert_dmp.from_dmp(wanted, template(model), model)

  for changes, text in (
    ({'prompt_embeddings': None}, 'missing: prompt_embeddings for blocks_0'),
    ({'prompt_embeddings': np.zeros((2, 4, 48))}, 'reshaped: prompt_emb'),
    ({'gate.weight': np.zeros((16, 48))}, 'reshaped: gate.weight'),
    ({'blocks.1.mlp.fc1.bias': None}, 'missing: blocks.1.mlp.fc1.bias'),
    ({'extra': np.zeros(1)}, 'unused: extra'),
  ):
    with pytest.raises(convert.ConversionError, match=text):
      read(**changes)
  with pytest.raises(convert.ConversionError, match=r'of 3 blocks .* found 2'):
    read(MODEL.clone(hooks=dmp(16)))
  plain = MODEL.clone(hooks=adaln.Hooks())
  with pytest.raises(convert.ConversionError, match='a model with prompts'):
    read(plain)


def test_stacked_and_unrolled_agree(state):
  scanned = MODEL.clone(scan=True)
  stacked = convert_dmp.from_dmp(state, template(scanned), scanned)
  jax.tree.map(
    np.testing.assert_array_equal,
    transformer.unstack_blocks(stacked),
    convert_dmp.from_dmp(state, template(), MODEL),
  )
