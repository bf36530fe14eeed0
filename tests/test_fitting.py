"""Check what becomes of widths that devices do not divide."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from vfm_jax import fitting, sharding

PODS = {'data': 1, 'fsdp': 256, 'tensor': 1, 'seq': 1, 'expert': 1}
HALVES = PODS | {'data': 2, 'fsdp': 128}
D = 1152  # DiT-XL: 128 * 9


@pytest.mark.parametrize(
  ('entries', 'shape', 'spec'),
  [
    (('fsdp', 'tensor'), (D, 4 * D), P(None, 'fsdp')),  # fc1: the wider axis
    (('tensor', 'fsdp'), (4 * D, D), P('fsdp')),  # fc2
    (('fsdp', None), (28, D, 6 * D), P(None, None, 'fsdp')),  # never the depth
  ],
)
def test_another_axis_takes_what_does_not_divide(entries, shape, spec):
  found = fitting.fit(entries, shape, PODS)
  assert found == fitting.Fit(spec)


def test_what_no_axis_takes_is_a_problem_with_a_way_out():
  found = fitting.fit(('fsdp', None, 'tensor', None), (D, 3, 16, 72), PODS)
  assert found.spec == P()
  assert found.ways == 128
  (text,) = found.problems
  assert text == (
    f'axis 0 of {D} does not divide by fsdp=256, nor does another axis of it'
  )


@pytest.mark.parametrize(
  ('shape', 'spec'),
  [
    ((D, 3, 16, 72), P('fsdp', None, None, 'data')),
    ((4 * D, 3, 16, 72), P(('fsdp', 'data'))),
    ((128, 3, 1, 9), P('fsdp')),  # fewer ways
  ],
)
def test_spread_rules_cut_over_data_where_it_divides(shape, spec):
  (rule,) = (r for r in sharding.spread() if r.pattern == 'qkv/kernel')
  assert rule.spec == (('fsdp', 'data'), None, 'tensor', None)
  assert fitting.fit(rule.spec, shape, HALVES) == fitting.Fit(spec)


def test_heads_and_experts_do_not_move():
  sizes = PODS | {'fsdp': 1, 'tensor': 8, 'expert': 4}
  found = fitting.fit(('expert', 'tensor'), (3, 12), sizes)
  assert found.problems == (
    'axis 0 of 3 does not divide by expert=4',
    'axis 1 of 12 does not divide by tensor=8',
  )
  assert found.ways == 0


SIZES = st.sampled_from([1, 2, 3, 4, 6, 8])


@settings(deadline=None, max_examples=60)
@given(
  st.lists(st.sampled_from([1, 3, 8, 12, 16, 18]), min_size=2, max_size=4),
  SIZES,
  SIZES,
  SIZES,
)
def test_a_fit_divides_and_uses_an_axis_once(shape, fsdp, data, tensor):
  sizes = {'fsdp': fsdp, 'data': data, 'tensor': tensor}
  found = fitting.fit((('fsdp', 'data'), 'tensor'), shape, sizes)
  used = [
    name
    for entry in found.spec
    for name in ((entry,) if isinstance(entry, str) else entry or ())
  ]
  assert len(used) == len(set(used))
  assert all(sizes[name] > 1 for name in used)
  sharding.NamedSharding(
    jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes)), found.spec
  ).shard_shape(tuple(shape))  # raises if a cut is uneven
  if not found.problems:
    assert tensor == 1 or 'tensor' in used
    assert fsdp * data == 1 or {'fsdp', 'data'} & set(used)


def test_one_error_says_which_mesh_would_do():
  tree = {
    f'blocks/{name}': {'kernel': jax.ShapeDtypeStruct(shape, jnp.float32)}
    for name, shape in {'a': (D, D), 'b': (D, 4 * D), 'c': (768, 3)}.items()
  }
  with pytest.raises(sharding.ShardingError) as e:
    sharding.infer(tree, PODS | {'fsdp': 512})
  text = str(e.value)
  assert 'blocks/a' in text
  assert 'blocks/b' not in text
  assert 'blocks/c' in text
  assert 'config.mesh.fsdp=128, with more of config.mesh.data' in text
  assert 'config.rules=ref(sharding.spread)' in text
  sharding.infer(tree, PODS | {'data': 4, 'fsdp': 128}, sharding.spread())
