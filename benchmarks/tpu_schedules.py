"""Count the cycles of attention kernels in the TPU compiler's schedules.

Nothing runs and no TPU is needed: the compiler (extra `tpu`) schedules a kernel
statically, to the cycle, but for waiting for memory. Ours are compared with the
best of the block sizes of the splash attention that JAX ships, whose lengths
are multiples of 128. `tpu_schedules.json` beside this file has the cycles by
shape, for `describe --schedules`; `python -m benchmarks.tpu_schedules` writes
it anew. As a program with the name of a chip this is the process that compiles.
"""

import functools
import importlib.util
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from benchmarks import results, tpu_bundles

TABLE = pathlib.Path(__file__).with_suffix('.json')
TARGETS = {
  'v4': 'v4:2x2x1',
  'v5e': 'v5e:2x2',
  'v5p': 'v5p:2x2x1',
  'v6e': 'v6e:2x2',
}
# Queries, keys and head_dim: video encoders, of what is seen and of all; DiT-XL
# and the smaller.
SHAPES = (
  (160, 160, 64),
  (256, 256, 64),
  (256, 256, 72),
  (1568, 1568, 64),
  (2048, 2048, 64),
)
BATCH, HEADS = 32, 16
BARS = {(256, 256, 72): 0.70, (1568, 1568, 64): 0.75}
COMPARED = ('v5e', 'v6e')
# Padded length, block of queries, block of keys, keys at a time: the fastest of
# some thirty, with one kernel for all gradients and with two.
SPLASH = {
  (256, 256, 72): ((256, 256, 256, 256),),
  (1568, 1568, 64): ((1664, 128, 1664, 1664), (1792, 896, 1792, 896)),
}


def run(rounds: int) -> list[results.Comparison]:
  """Compare the cycles of a head, forward and backward."""
  del rounds  # the same each time
  found = {kind: measure(kind, 'compare') for kind in COMPARED}
  return [
    results.Comparison(
      title=f'{kind}, {shape[0]} tokens, head_dim {shape[2]}',
      reference='splash',
      unit='cycles',
      seconds={
        name: [sum(k['cycles'] for k in kernels)]
        for name, kernels in row['kernels'].items()
      },
      bars={'vfm_jax': BARS[shape]},
      notes='Static schedule of a head, forward and backward, bfloat16; '
      + spilled(row['kernels']),
      info=row,
    )
    for kind, rows in found.items()
    for row in rows
    for shape in [tuple(row['shape'])]
  ]


def spilled(kernels: dict[str, list[dict[str, Any]]]) -> str:
  """Say how many registers each contestant spills a grid step."""
  return 'registers spilled and filled a grid step: ' + ', '.join(
    f'{name} {sum(k["spills"] for k in ours)}' for name, ours in kernels.items()
  )


def measure(kind: str, what: str) -> Any:
  """Compile in a process of its own, and return what it found.

  Args:
    kind: of chip, one of `TARGETS`.
    what: 'ours' for the cycles of all `SHAPES`, 'compare' for those with a bar,
      beside splash.

  Raises:
    ImportError: the compiler is not installed.
    RuntimeError: the process failed.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise ImportError(
      'libtpu is needed here and is not installed; install it with: '
      "pip install 'vfm_jax[tpu]'"
    )
  with tempfile.TemporaryDirectory() as folder:
    env = {
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'JAX_ENABLE_COMPILATION_CACHE': 'false',
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '0',
      tpu_bundles.OPTIONS: tpu_bundles.options(folder),
    }
    done = subprocess.run(
      [sys.executable, '-m', 'benchmarks.tpu_schedules', kind, what, folder],
      env=env,
      capture_output=True,
      text=True,
    )
  if done.returncode:
    lines = done.stderr.splitlines()[-20:]
    raise RuntimeError(
      f'compiling for {kind} ended with {done.returncode}:\n' + '\n'.join(lines)
    )
  return json.loads(done.stdout.splitlines()[-1])


def serve(kind: str, what: str, folder: str) -> None:
  """Be the process that compiles; print JSON."""
  compiled = functools.partial(_schedules, kind, pathlib.Path(folder))
  if what == 'ours':
    rows = [k for shape in SHAPES for k in _ours(compiled, shape)]
  else:
    rows = [
      dict(
        shape=shape,
        kernels=dict(
          splash=_splash(compiled, shape), vfm_jax=_ours(compiled, shape)
        ),
      )
      for shape in BARS
    ]
  print(json.dumps(rows))


def _schedules(kind, folder, prefix, fn, *args):
  """Compile a function, and return the schedules of its kernels."""
  import jax

  from vfm_jax import topology

  for path in folder.iterdir():
    path.unlink()
  device = topology.devices(topology.parse(TARGETS[kind]))[0]
  where = jax.sharding.SingleDeviceSharding(device)
  jax.jit(fn, in_shardings=where, out_shardings=where).lower(*args).compile()
  return tpu_bundles.read(folder, prefix)


def _row(name, shape, schedule, steps, times, **more):
  return dict(
    kernel=name,
    queries=shape[0],
    keys=shape[1],
    head_dim=shape[2],
    cycles=round(schedule.cycles(steps, times), 1),
    spills=schedule.spills,
    mxu=round(schedule.mxu, 2),
    **more,
  )


def _ours(compiled: Callable[..., Any], shape) -> list[dict[str, Any]]:
  import jax
  import jax.numpy as jnp

  from vfm_jax.ops import flash_tpu_backward, flash_tpu_forward, flash_tpu_plan

  n, m, dim = shape
  q, k = (
    jax.ShapeDtypeStruct((BATCH, HEADS, x, dim), jnp.bfloat16) for x in (n, m)
  )
  row = jax.ShapeDtypeStruct((BATCH, HEADS, n), jnp.float32)
  options = dict(scale=dim**-0.5, logit_cap=None)
  there = flash_tpu_plan.forward(q, k, False)
  back = flash_tpu_plan.backward(q, k, False)

  def forward(q, k, v):
    return flash_tpu_forward.forward(
      q, k, v, None, plan=there, out_dtype=q.dtype, **options
    )

  def backward(q, k, v, grad, lse, inner):
    return flash_tpu_backward.backward(
      q, k, v, grad, lse, inner, None, plan=back, kv_dtype=k.dtype, **options
    )

  found = compiled('flash_tpu', forward, q, k, k)
  found |= compiled('flash_tpu', backward, q, k, k, q, row, row)
  sizes = dict(flash_tpu_forward=(n, there), flash_tpu_backward=(m, back))
  rows = []
  for name, schedule in found.items():
    length, plan = sizes[name]
    steps = -(-length // plan.block) / plan.heads
    # Their conditions hold in the first or the last step of some heads.
    rows.append(_row(name, shape, schedule, steps, 1 / plan.heads))
  return rows


def _splash(compiled: Callable[..., Any], shape) -> list[dict[str, Any]]:
  """Return the fastest forward and backward kernels of one padded length."""
  kernels: dict[int, tuple[list, list]] = {}
  for sizes, fused in itertools.product(SPLASH[shape], (False, True)):
    length, queries, keys, _ = sizes
    steps = (length // queries) * (length // keys)
    rows = [
      _row(name, shape, s, steps, 1, sizes=sizes)
      for name, s in _splash_schedules(compiled, shape, sizes, fused).items()
    ]
    forward, backward = kernels.setdefault(length, ([], []))
    forward += [[r] for r in rows if '_fwd' in r['kernel']]
    backward.append([r for r in rows if '_fwd' not in r['kernel']])
  cycles = lambda rows: sum(r['cycles'] for r in rows)  # noqa: E731
  best = [
    min(forward, key=cycles) + min(backward, key=cycles)
    for forward, backward in kernels.values()
  ]
  return min(best, key=cycles)


def _splash_schedules(compiled, shape, sizes, fused):
  import jax
  import jax.numpy as jnp
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
  )

  length, queries, keys, at_once = sizes
  blocks = dict(
    block_q=queries,
    block_kv=keys,
    block_kv_compute=at_once,
    block_q_dkv=queries,
    block_kv_dkv=keys,
    block_kv_dkv_compute=at_once,
  )
  if not fused:
    blocks |= dict(block_q_dq=queries, block_kv_dq=keys)
  full = splash_attention_mask.FullMask((length, length))
  attend = splash_attention_kernel.make_splash_mha(
    splash_attention_mask.MultiHeadMask([full] * HEADS),
    head_shards=1,
    q_seq_shards=1,
    block_sizes=splash_attention_kernel.BlockSizes(
      use_fused_bwd_kernel=fused, **blocks
    ),
  )

  def loss(q, k, v, ids):
    # Padding has a segment of its own.
    segments = None
    if length != shape[0]:
      segments = splash_attention_kernel.SegmentIds(ids, ids)
    return attend(q, k, v, segment_ids=segments).astype(jnp.float32).sum()

  q = jax.ShapeDtypeStruct((HEADS, length, shape[2]), jnp.bfloat16)
  ids = jax.ShapeDtypeStruct((length,), jnp.int32)
  return compiled('splash', jax.grad(loss, (0, 1, 2)), q, q, q, ids)


def write() -> None:
  """Write the cycles of our kernels by chip and shape."""
  table = {kind: measure(kind, 'ours') for kind in TARGETS}
  lines = (
    f'{json.dumps(kind)}: [\n  '
    + ',\n  '.join(json.dumps(row) for row in rows)
    + '\n]'
    for kind, rows in table.items()
  )
  TABLE.write_text('{' + ',\n'.join(lines) + '}\n')


if __name__ == '__main__':
  if sys.argv[1:]:
    serve(*sys.argv[1:])
  else:
    write()
