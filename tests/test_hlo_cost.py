"""Check what is read out of compiled modules, on small ones written by hand."""

import collections
import pathlib

import pytest

from vfm_jax import hlo, hlo_cost

# Shaped like what the TPU compiler prints: a scanned layer that gathers its
# kernel, a kernel of Pallas, a branch, an asynchronous gather in three fusions
# and a fused reduce-scatter.
MODULE = pathlib.Path(__file__).with_name('hlo_tpu_step.txt').read_text()


def kinds(cost):
  found = collections.Counter()
  for c in cost.collectives:
    found[c.kind] += c.times
  return found


def test_shapes_and_bytes():
  text = '(bf16[2,3]{1,0:T(8,128)(2,1)}, f32[], s4[3], pred[5], f8e4m3fn[4])'
  shapes = hlo.arrays(text)
  assert [s.dims for s in shapes] == [(2, 3), (), (3,), (5,), (4,)]
  assert [s.nbytes for s in shapes] == [12, 4, 2, 5, 4]


def test_instructions():
  module = hlo.parse(MODULE)
  assert module.entry == 'main'
  lines = {i.name: i for i in module.computations['body']}
  flash = lines['flash.7']
  assert flash.opcode == 'custom-call'
  assert flash.operands == ('fusion.1', 'x')
  assert [r.dims for r in flash.results] == [(2, 4, 16, 64), (2, 4, 16)]
  assert lines['fusion.1'].called == {'calls': ['fused']}
  [loop] = [i for i in module.computations['main'] if i.opcode == 'while']
  assert module.trips(loop) == 24


def test_trips_that_the_compiler_wrote_down():
  known = ' backend_config={"known_trip_count":{"n":"3"},"x":1}'
  text = MODULE.replace('body=%body', 'body=%body,' + known)
  assert kinds(hlo_cost.cost(text))['all-gather'] == 3 + 1


def test_loops_multiply_and_asynchronous_gathers_count_once():
  cost = hlo_cost.cost(MODULE)
  assert kinds(cost) == {
    'all-gather': 24 + 1,
    'reduce-scatter': 1,
    'collective-permute': 1,
  }
  by_channel = {c.kind: c.nbytes for c in cost.collectives}
  assert by_channel['reduce-scatter'] == 32 * 4 * 4
  assert by_channel['collective-permute'] == 8 * 4 * 4
  gathers = [c for c in cost.collectives if c.kind == 'all-gather']
  assert [c.nbytes for c in gathers] == [4 * 64 * 2, 8 * 64 * 2]
  assert gathers[0].op_name.endswith('fc1/dot_general')


def test_cycles():
  cost = hlo_cost.cost(MODULE)
  # A fusion stands for what is in it, and of a branch the dearer one counts.
  assert cost.cycles == 24 * 1000 + 7 + 50
  assert cost.by_op['forward fc1/dot_general'] == 24 * 1000


def test_kernels_cost_what_their_schedules_say():
  def cycles(kernel):
    assert kernel.name == 'flash_forward'
    batch, heads, *_ = kernel.results[0].dims
    return 10.0 * batch * heads

  cost = hlo_cost.cost(MODULE, cycles)
  assert cost.cycles == 24 * (1000 + 80) + 7 + 50
  assert cost.uncounted() == []
  # And the guess that the compiler was given does not count.
  assert hlo_cost.cost(MODULE).uncounted() == ['flash_forward']


def test_gathers_of_anything_but_parameters():
  gathers = hlo_cost.cost(MODULE).collectives
  weights = hlo_cost.parameter_sizes([(24, 4, 64)], [])
  [other] = hlo_cost.gathered_activations(gathers, weights)
  assert other.results[0].dims == (8, 64)
  both = hlo_cost.parameter_sizes([(24, 4, 64), (16, 64)], [2])
  assert hlo_cost.gathered_activations(gathers, both) == []


def test_a_text_without_a_module():
  with pytest.raises(ValueError, match='with an ENTRY'):
    hlo.parse('module @jit_step {}')
