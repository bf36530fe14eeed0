"""Share what tests of the kernels' benchmarks need."""

import importlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def benchmark_module(monkeypatch):
  """Return what imports a module of `benchmarks`, also in child processes."""
  monkeypatch.syspath_prepend(str(ROOT))
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  return lambda name: importlib.import_module(f'benchmarks.{name}')
