import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released

from vfm_jax import convert, convert_dit, export
from vfm_jax.models import switch
from vfm_jax.models.routing import Routing
from vfm_jax.nn.adaln import Hooks

GOLDEN = pathlib.Path(__file__).parent / 'golden'
HOOKS = {
  'd_dtr_forward': lambda cfg: Hooks(mask=Routing(beta=cfg['ratio'])),
  'e_switch_dit': lambda cfg: switch.switch(cfg['E'], top_k=cfg['k']),
}


def load(case):
  """Return the model and the checkpoint of a recorded case."""
  cfg = json.loads((GOLDEN / f'{case}.json').read_text())['config']
  model = released.dit(cfg, HOOKS[case](cfg))
  with np.load(GOLDEN / f'{case}.npz') as file:
    return model, {k[2:]: file[k] for k in file.files if k.startswith('w/')}


def template(model):
  x = jnp.zeros((1, model.input_size, model.input_size, 4))
  zero = jnp.zeros(1, jnp.int32)
  make = lambda: model.init(jax.random.key(0), x, zero * 1.0, tau=zero)  # noqa: E731
  return jax.eval_shape(make)['params']


@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.parametrize('case', HOOKS)
def test_round_trip_is_exact(case, scan):
  model, state = load(case)
  model = model.clone(scan=scan)
  params = convert_dit.from_dit(state, template(model), model=model)
  back = convert_dit.to_dit(params, model)
  assert back.keys() == state.keys()
  for name, tensor in state.items():
    assert back[name].dtype == np.float32
    tolerance = 1e-6 * (name == 'pos_embed')
    np.testing.assert_allclose(back[name], tensor, rtol=0, atol=tolerance)


def test_experts_keep_their_axes():
  model, state = load('e_switch_dit')
  params = convert_dit.from_dit(state, template(model), model=model)
  hook = params['blocks_1']['mask_hook']
  kernel = state['routers.1.experts.w']
  np.testing.assert_array_equal(hook['experts']['kernel'], kernel)
  gate = state['routers.1.f_gate.1.weight']
  np.testing.assert_array_equal(hook['gate']['kernel'], gate.T)


def test_every_fault_is_named():
  model, state = load('e_switch_dit')
  faulty = dict(state)
  faulty['routers.0.experts.v'] = faulty.pop('routers.0.experts.w')
  faulty['routers.1.f_gate.1.bias'] = np.zeros(4)
  with pytest.raises(convert.ConversionError) as e:
    convert_dit.from_dit(faulty, template(model), model=model)
  for text in (
    'missing: routers.0.experts.w for blocks_0/mask_hook/experts/kernel',
    'unused: routers.0.experts.v',
    'reshaped: routers.1.f_gate.1.bias is (4,)',
  ):
    assert text in str(e.value)


@pytest.mark.parametrize('hook', [None, Routing(beta=0.6), Routing(alpha=1.0)])
def test_masks_must_be_those_of_the_model(hook):
  model, state = load('d_dtr_forward')
  other = model.clone(hooks=Hooks(mask=hook))
  with pytest.raises(
    convert.ConversionError,
    match=r'(?s)not a table of the model.*denoiser\.hooks',
  ):
    convert_dit.from_dit(state, template(other), model=other)
  with pytest.raises(convert.ConversionError, match='expected none'):
    convert_dit.from_dit(state, template(model))
  ignore = {r'.*_unit_mapping': 'another network is meant'}
  convert_dit.from_dit(state, template(other), model=other, ignore=ignore)
  bare = {k: v for k, v in state.items() if '_unit_mapping' not in k}
  convert_dit.from_dit(bare, template(model), model=model)


@pytest.mark.parametrize('name', ['full_time', 'prior._unit_mapping'])
def test_tables_of_switch_dit_are_checked(name):
  model, state = load('e_switch_dit')
  other = {**state, name: state[name][::-1]}
  with pytest.raises(
    convert.ConversionError, match=rf'(?s){name} .*another one'
  ):
    convert_dit.from_dit(other, template(model), model=model)


@pytest.mark.parametrize('case', HOOKS)
def test_diffusers_has_no_routing(case):
  model, state = load(case)
  params = convert_dit.from_dit(state, template(model), model=model)
  with pytest.raises(
    convert.ConversionError, match=r'expected no `denoiser\.hooks`'
  ):
    export.to_diffusers(params, model)
