"""Check targets, and what is said where a compiler is not installed."""

import importlib.util

import pytest

from vfm_jax import topology


def test_targets():
  v5e = topology.parse('v5e:16x16')
  assert (v5e.devices, v5e.platform) == (256, 'tpu')
  assert topology.parse('v4:4x4x4').devices == 64
  h200 = topology.parse('h200:8')
  assert (h200.devices, h200.platform, h200.clock_hz) == (8, 'gpu', None)


@pytest.mark.parametrize(
  'name', ['v5e', 'v5e:16', 'v4:4x4', 'v9:2x2', 'h200:2x4', 'v5e:0x4', 'v5e:x']
)
def test_unknown_targets(name):
  with pytest.raises(topology.TopologyError, match=f'v5e:AxB.*{name}'):
    topology.parse(name)


@pytest.mark.parametrize(
  ('target', 'extra'), [('v5e:2x2', 'tpu'), ('h200:8', 'cuda')]
)
def test_a_compiler_that_is_not_installed(target, extra, monkeypatch):
  find = importlib.util.find_spec
  missing = ('libtpu', 'jax_cuda13_plugin', 'jax_cuda12_plugin')
  monkeypatch.setattr(
    importlib.util, 'find_spec', lambda m: None if m in missing else find(m)
  )
  with pytest.raises(
    topology.TopologyError, match=rf"pip install 'vfm_jax\[{extra}\]'"
  ):
    topology.devices(topology.parse(target))
