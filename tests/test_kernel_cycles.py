"""Check the cycles that a table of schedules gives to kernels."""

import json

import pytest

from vfm_jax import hlo, hlo_cost, kernel_cycles, topology

V5E = topology.parse('v5e:4x4')
ROW = dict(kernel='flash', queries=160, keys=160, head_dim=64, cycles=10.5)


def kernel(name='flash', dim=64):
  q = hlo.Shape('bf16', (2, 4, 160, dim))
  lse = hlo.Shape('f32', (2, 4, 160))
  return hlo_cost.Kernel(name, (q, q, q, lse), (q,), 1)


def test_cycles_are_those_of_each_head(tmp_path):
  path = tmp_path / 'table.json'
  path.write_text(json.dumps({'v5e': [ROW], 'v6e': []}))
  cycles = kernel_cycles.load(str(path), V5E)
  assert cycles(kernel()) == 2 * 4 * 10.5
  assert cycles(kernel(dim=72)) is None
  assert cycles(kernel('other')) is None
  assert cycles(hlo_cost.Kernel('flash', (), (), 1)) is None
  other = kernel_cycles.load(str(path), topology.parse('v6e:4x4'))
  assert other(kernel()) is None


def test_a_table_of_another_form(tmp_path):
  path = tmp_path / 'table.json'
  path.write_text(json.dumps({'v5e': [{'kernel': 'flash'}]}))
  with pytest.raises(ValueError, match=r'--schedules=.*queries'):
    kernel_cycles.load(str(path), V5E)
