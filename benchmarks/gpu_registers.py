"""Compile the Mosaic GPU kernels for Hopper, and tell their registers.

    python -m benchmarks.gpu_registers [--head_dims 64,72,80,88,128]

No GPU and no driver are needed, but the compiler that the extra `cuda` brings.
What a register less or more does to the time is not told: nothing runs.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

HEAD_DIMS = (64, 72, 80, 88, 128)
# Of a thread, where three warpgroups share the registers of a processor.
LIMIT = 168
# Without and with all that a call may ask for.
OPTIONS = ('plain', 'segments,cap')

_PATTERN = re.compile(
  r'Function properties for (vfm_attention_\w+?)_mosaic_gpu_kernel\n'
  r'.*?(\d+) bytes spill stores, (\d+) bytes spill loads\n'
  r'.*?Used (\d+) registers'
)


class Kernel(NamedTuple):
  """Hold what the assembler says about a kernel.

  Attributes:
    name: which kernel.
    registers: of a thread.
    spilled: bytes of registers that are stored to memory and loaded back.
  """

  name: str
  registers: int
  spilled: int


class CompileError(RuntimeError):
  """Say what the compiler printed when it failed."""


def kernels(head_dim: int, options: str, tokens: int = 1569) -> list[Kernel]:
  """Return the kernels of a differentiated call, in a process of its own.

  Args:
    head_dim: features of a head.
    options: of `OPTIONS`; with segments two heads share keys, too.
    tokens: number of queries and of keys; by default no multiple of a tile.

  Raises:
    CompileError: they do not compile.
  """
  program = (
    'from benchmarks import gpu_registers as g; '
    f'g.compile_for_hopper({head_dim}, {options!r}, {tokens})'
  )
  env = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'MOSAIC_GPU_DUMP_PTXAS': '1',
    # A compiled program from the cache would print nothing.
    'JAX_ENABLE_COMPILATION_CACHE': 'false',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '0',
  }
  done = subprocess.run(
    [sys.executable, '-c', program],
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
  )
  # Linkers print zero bytes between lines.
  text = done.stdout.replace(b'\0', b'').decode(errors='replace')
  found = [
    Kernel(name, int(registers), int(stores) + int(loads))
    for name, stores, loads, registers in _PATTERN.findall(text)
  ]
  if done.returncode or len(found) != 3:
    raise CompileError(
      f'expected 3 kernels of head_dim {head_dim}, {options}; found '
      f'{[k.name for k in found]}:\n' + '\n'.join(text.splitlines()[-20:])
    )
  return sorted(found)


def compile_for_hopper(head_dim: int, options: str, tokens: int) -> None:
  """Compile attention and its gradient for an H200 that is not here."""
  import jax
  import jax.numpy as jnp

  from vfm_jax import topology
  from vfm_jax.ops import flash_gpu

  device = topology.devices(topology.parse('h200:1'))[0]
  where = jax.sharding.SingleDeviceSharding(device)

  def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

  q = array(2, tokens, 4, head_dim)
  k = array(2, tokens, 2 if 'segments' in options else 4, head_dim)
  ids = array(2, tokens, dtype=jnp.int32)

  def loss(q, k, v, ids):
    out = flash_gpu.attend(
      q,
      k,
      v,
      segment_ids=ids if 'segments' in options else None,
      scale=head_dim**-0.5,
      logit_cap=30.0 if 'cap' in options else None,
    )
    return jnp.sin(out.astype(jnp.float32)).sum()

  gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
  gradient.lower(q, k, k, ids).compile()


def table(head_dims: Sequence[int]) -> str:
  """Compile all, and return one markdown table."""
  lines = [
    '| head_dim | options | kernel | registers | bytes spilled |',
    '|---|---|---|---|---|',
  ]
  for dim in head_dims:
    for options in OPTIONS:
      for kernel in kernels(dim, options):
        name = kernel.name.removeprefix('vfm_attention_')
        lines.append(
          f'| {dim} | {options} | {name} | {kernel.registers} '
          f'| {kernel.spilled} |'
        )
        print(lines[-1], file=sys.stderr, flush=True)
  return '\n'.join(lines)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(prog='python -m benchmarks.gpu_registers')
  parser.add_argument('--head_dims', default=','.join(map(str, HEAD_DIMS)))
  args = parser.parse_args()
  print(table([int(d) for d in args.head_dims.split(',')]))
