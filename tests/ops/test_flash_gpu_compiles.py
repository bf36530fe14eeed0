"""Compile the Mosaic GPU kernels for a Hopper card that is not there."""

import importlib.util

import jax
import pytest

from vfm_jax.ops import flash_gpu


@pytest.fixture
def gpu_registers(benchmark_module):
  return benchmark_module('gpu_registers')


@pytest.mark.slow
@pytest.mark.parametrize('options', ['plain', 'segments,cap'])
@pytest.mark.parametrize('head_dim', [64, 72, 80, 88, 128])
def test_no_register_is_spilled(gpu_registers, head_dim, options):
  if not importlib.util.find_spec('jax_cuda13_plugin'):
    pytest.skip('needs the compiler of the extra `cuda`')
  if jax.__version_info__ < flash_gpu.JAX:
    pytest.skip(f'needs jax {flash_gpu.JAX}')
  for kernel in gpu_registers.kernels(head_dim, options):
    assert kernel.spilled == 0, kernel
    assert kernel.registers <= gpu_registers.LIMIT, kernel


def test_a_failing_compile_says_what_was_printed(gpu_registers, monkeypatch):
  monkeypatch.setattr(gpu_registers.sys, 'executable', '/bin/false')
  with pytest.raises(gpu_registers.CompileError, match='expected 3 kernels'):
    gpu_registers.kernels(64, 'plain')
