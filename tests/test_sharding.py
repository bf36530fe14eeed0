"""Check meshes, strict inference and the placement of batches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from vfm_jax import sharding, trees
from vfm_jax.sharding import Mesh, Rule

SIZES = {'data': 2, 'fsdp': 4, 'tensor': 2, 'seq': 1, 'expert': 1}


def struct(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def specs(tree, sizes=SIZES, rules=sharding.RULES):
  placed = sharding.infer(tree, sizes, rules)
  return {path: s.spec for path, s in trees.path_leaves(placed)}


def test_one_axis_takes_what_is_left():
  assert Mesh().sizes(8)['data'] == 8
  sizes = Mesh(data=2, fsdp=-1, tensor=2).sizes(16)
  assert sizes == {'data': 2, 'fsdp': 4, 'tensor': 2, 'seq': 1, 'expert': 1}


@pytest.mark.parametrize(
  ('mesh', 'message'),
  [
    (Mesh(tensor=3), r"config\.mesh=.*'tensor': 3.*multiple of 3.*found 8"),
    (Mesh(data=4), r'needs 4 devices; found 8'),
    (Mesh(fsdp=-1), r"one axis at most; found \['data', 'fsdp'\]"),
    (Mesh(seq=0), r"found \['seq'\]"),
  ],
)
def test_meshes_that_do_not_fit(mesh, message):
  with pytest.raises(sharding.ShardingError, match=message):
    mesh.sizes(8)


def test_make_mesh_has_auto_axes():
  mesh = sharding.make_mesh(Mesh(fsdp=2), jax.devices()[:4])
  assert dict(mesh.shape)['data'] == 2
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_rules_align_to_the_trailing_axes():
  tree = {
    'blocks_0': {'attn': {'qkv': {'kernel': struct(8, 3, 4, 2)}}},
    'blocks': {'attn': {'qkv': {'kernel': struct(5, 8, 3, 4, 2)}}},
  }
  got = specs(tree)
  assert got['blocks_0/attn/qkv/kernel'] == P('fsdp', None, 'tensor')
  assert got['blocks/attn/qkv/kernel'] == P(None, 'fsdp', None, 'tensor')


def test_moments_and_averages_lie_as_their_parameters():
  params = {'mlp': {'fc1': {'kernel': struct(8, 16), 'bias': struct(16)}}}
  state = {
    'params': params,
    'opt': jax.eval_shape(optax.adam(1e-3).init, params),
    'ema': {'0.999': params},
    'rng': jax.ShapeDtypeStruct((2,), jnp.uint32),
    'step': jax.ShapeDtypeStruct((), jnp.int32),
  }
  got = specs(state)
  kernels = {s for path, s in got.items() if path.endswith('fc1/kernel')}
  assert kernels == {P('fsdp', 'tensor')}
  assert got['rng'] == got['step'] == got['opt/0/count'] == P()


def test_axes_of_size_one_count_as_nothing():
  tree = {'kernel': struct(7, 3)}
  assert specs(tree, {'data': 8, 'fsdp': 1})['kernel'] == P()


def test_rules_match_whole_components():
  rules = (Rule('b/kernel', ('fsdp',)), Rule('kernel', ()))
  tree = {'ab': {'kernel': struct(8)}, 'b': {'kernel': struct(8)}}
  assert specs(tree, rules=rules) == {'ab/kernel': P(), 'b/kernel': P('fsdp')}


def test_one_error_lists_every_offence():
  rules = (
    Rule('odd', ('fsdp',)),
    Rule('deep', (None, None, None)),
    Rule('alien', ('model',)),
    Rule('gone', ()),
    Rule('spare', (), optional=True),
  )
  tree = {
    'odd': struct(6),
    'deep': struct(4, 4),
    'alien': struct(4),
    'unruled': struct(3),
  }
  with pytest.raises(sharding.ShardingError, match=r'config\.rules') as e:
    sharding.infer(tree, SIZES, rules)
  text = str(e.value)
  assert 'axis 0 of 6 does not divide by fsdp=4' in text
  assert 'too many' in text
  assert "no axis ['model']" in text
  assert 'unruled [3]: no rule matches' in text
  assert "'gone': matches no leaf" in text
  assert 'spare' not in text


def test_batch_is_cut_over_the_batch_axes_only():
  assert sharding.batch_sharding(SIZES).spec == P(('data', 'fsdp'))
  assert sharding.batch_sharding({'tensor': 4}).spec == P(None)


def test_put_batch_and_its_error():
  mesh = sharding.make_mesh(Mesh(data=2, fsdp=2, tensor=2))
  batch = {'x': np.arange(8.0), 'labels': {}}
  put = sharding.put_batch(batch, mesh)
  np.testing.assert_array_equal(put['x'], batch['x'])
  assert {s.data.shape for s in put['x'].addressable_shards} == {(2,)}
  with pytest.raises(
    sharding.ShardingError, match=r'batch_size=6 .* a multiple of 4'
  ):
    sharding.put_batch({'x': np.zeros(6)}, mesh)


def test_one_process_loads_all_rows():
  mesh = sharding.make_mesh(Mesh(tensor=2))
  assert sharding.process_slot(mesh) == (0, 1)


def test_logical_names_mean_something_inside_activations_only():
  mesh = sharding.make_mesh(Mesh(data=2, tensor=4))

  def f(x):
    x = nn.with_logical_constraint(x, ('batch', 'tokens', 'heads', None))
    return x, sharding.constrain(x * 2, 'batch', None, 'embed', None)

  x = jnp.ones((4, 6, 8, 2))
  with sharding.activations(mesh):
    heads, embed = jax.jit(f)(x)
  assert heads.sharding.spec == P('data', None, 'tensor')
  assert embed.sharding.spec == P('data')
  assert len(jax.jit(f)(x)[0].sharding.device_set) == 1
  with pytest.raises(sharding.ShardingError, match='2 names'):
    sharding.constrain(x, 'batch', 'tokens')


def test_a_batch_may_be_uneven_where_tokens_may_not():
  mesh = sharding.make_mesh(Mesh(data=2, seq=4))

  def f(x):
    return sharding.constrain(x, 'batch', 'tokens', None)

  with sharding.activations(mesh):
    one = jax.jit(f)(jnp.ones((1, 8, 2)))
    assert one.sharding.spec[1] == 'seq'
    jax.eval_shape(f, jnp.ones((2, 1, 2)))
    with pytest.raises(
      sharding.ShardingError, match=r'mesh\.seq=4 does not divide the 6 tokens'
    ):
      jax.eval_shape(f, jnp.ones((2, 6, 2)))


def test_large_leaves_that_are_kept_whole_are_told():
  tree = {
    'kernel': struct(16, 4),
    'pos_embed': struct(2**10, 2**8),
    'bias': struct(4),
  }
  assert sharding.whole(tree, sharding.infer(tree, SIZES)) == [
    ('pos_embed', 2**20)
  ]
  # Replicas alone keep everything whole.
  assert not sharding.whole(tree, sharding.infer(tree, {'data': 8}))


def test_report_counts_bytes_a_device():
  tree = {'kernel': struct(16, 4), 'bias': struct(4)}
  text = sharding.report(tree, sharding.infer(tree, SIZES))
  assert text.splitlines()[-1].split() == ['total', str(16 + 64)]


def test_arrays_really_lie_where_inferred():
  mesh = sharding.make_mesh(Mesh(data=1, fsdp=4, tensor=2))
  tree = {'mlp': {'fc1': {'kernel': jnp.ones((8, 16))}}}
  placed = jax.device_put(tree, sharding.infer(tree, mesh))
  shard = placed['mlp']['fc1']['kernel'].addressable_shards[0]
  assert shard.data.shape == (2, 8)
