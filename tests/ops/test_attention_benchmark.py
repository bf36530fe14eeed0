"""Run the benchmark of attention at a toy shape, on what is here."""

import pytest


@pytest.fixture
def benchmark(benchmark_module):
  return benchmark_module('attention')


def test_times_what_runs_and_names_what_refuses(benchmark, monkeypatch):
  monkeypatch.setattr(benchmark.importlib.util, 'find_spec', lambda name: None)
  found = benchmark.compare(benchmark.Shape('a toy', 16, 2, 8), rounds=2)
  assert set(found.seconds) == {'xla_saved', 'xla'}
  assert all(len(times) == 2 for times in found.seconds.values())
  refused = found.info['refused']
  assert refused['cudnn'] == 'needs a GPU, found cpu'
  assert refused['tokamax'] == 'is not installed'
  assert 'Refused: pallas_tpu (needs a TPU, found cpu).' in found.notes
  # 2 flops x 6 products of 98 x 2 heads x 16 x 16 x 8.
  assert found.info['flops'] == 2 * 6 * 98 * 2 * 16 * 16 * 8


def test_shapes_are_those_of_the_models(benchmark):
  assert {(s.tokens, s.heads, s.head_dim) for s in benchmark.SHAPES} == {
    (1568, 12, 64),
    (1568, 16, 64),
    (1568, 16, 80),
    (160, 16, 64),
    (256, 12, 64),
    (256, 16, 64),
    (256, 16, 72),
  }
