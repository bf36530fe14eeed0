"""Check what a description says of a model on meshes that are not here."""

import functools
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from vfm_jax import describe as describe_lib
from vfm_jax import optim, schedules
from vfm_jax.sharding import ShardingError

DEPTH, D = 3, 16


class State(NamedTuple):
  params: dict
  opt_state: object
  ema: dict
  extra: dict
  step: jax.Array


def init_params():
  block = {
    'mlp': {
      'fc1': {'kernel': jnp.zeros((DEPTH, D, 64))},
      'fc2': {'kernel': jnp.zeros((DEPTH, 64, D))},
    }
  }
  return {'encoder': {'blocks': block}, 'head': {'bias': jnp.zeros(D)}}


def apply(params, x):
  def body(x, block):
    h = x @ block['mlp']['fc1']['kernel']
    return x + h @ block['mlp']['fc2']['kernel'], None

  return jax.lax.scan(body, x, params['encoder']['blocks'])[0]


def describe(sizes, **kw):
  optimizer = optim.Optimizer(
    functools.partial(schedules.constant, value=0.1),
    groups=(optim.Group('head', freeze=True),),
    layer_decay=0.5,
  )
  params = jax.eval_shape(init_params)
  tx, rows = optimizer.build(params, 10)
  state = State(
    params,
    jax.eval_shape(tx.init, params),
    {'0.999': params},
    {},
    jax.ShapeDtypeStruct((), jnp.int32),
  )
  batch = {'x': jax.ShapeDtypeStruct((512, D), jnp.float32), 'labels': {}}
  return describe_lib.describe(
    state=state, batch=batch, mesh=sizes, rows=rows, **kw
  )


@pytest.mark.parametrize('fsdp', [1, 8, 16])
def test_bytes_a_device(fsdp):
  got = describe({'data': 2, 'fsdp': fsdp}).data
  matrices = 2 * DEPTH * D * 64 * 4
  memory = got['bytes_per_device']
  assert got['devices'] == 2 * fsdp
  assert memory['params'] == memory['ema'] == matrices // fsdp + 4 * D
  assert memory['moments'] == 2 * matrices // fsdp + 8  # and two counts
  assert memory['batch'] == 512 * D * 4 // (2 * fsdp)


def test_parameters():
  got = describe({'data': 1}).data
  rows = {p['path']: p for p in got['parameters']}
  fc1 = rows['encoder/blocks/mlp/fc1/kernel']
  assert fc1['lr_scale'] == (0.125, 0.25, 0.5)
  assert fc1['weight_decay'] == 0.05
  assert rows['head/bias']['frozen']
  assert got['num_params'] - got['num_trainable'] == D
  json.dumps(got)


def test_flops_and_fit():
  def step(state, batch):
    return jax.grad(lambda p: apply(p, batch['x']).sum())(state.params)

  got = describe({'data': 256}, step_fn=step, device_bytes=10**5)
  once = DEPTH * 2 * (2 * 512 * D * 64)
  # The first layer needs no gradient of its input, but a scan computes it.
  assert got.data['flops_per_step'] == 3 * once
  assert got.data['fits'] is False
  assert 'NO' in got.text
  assert 'data=256 (256 devices)' in got.text
  assert 'frozen' in got.text


def test_what_is_kept_whole_is_told():
  text = describe({'fsdp': 8}).text
  assert 'whole on every device' not in text
  pos = {'pos_embed': jax.ShapeDtypeStruct((2**10, 2**9), jnp.float32)}
  state = State(pos, {}, {}, {'kernel': jnp.zeros((8, 8))}, jnp.zeros(()))
  got = describe_lib.describe(state=state, batch={}, mesh={'fsdp': 8})
  assert got.data['whole'] == {'params/pos_embed': 2**21}
  assert 'MiB  params/pos_embed' in got.text


def test_batch_must_divide():
  with pytest.raises(ShardingError, match=r'batch_size=512 .* a multiple of 3'):
    describe({'data': 3})
