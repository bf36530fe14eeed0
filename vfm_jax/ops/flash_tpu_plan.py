"""Choose the sizes of blocks of the TPU attention kernels.

The numbers were found with `python -m benchmarks tpu_schedules`.
"""

import dataclasses
import math

import jax

# Tokens up to which a grid step takes several heads.
_SHORT = 256


@dataclasses.dataclass(frozen=True)
class Plan:
  """Size the blocks of a kernel, whose grid is over B, H / heads and blocks.

  Attributes:
    heads: heads a grid step.
    block: queries (forward) or keys (backward) a grid step.
    rows: those of them that are computed at a time, a divisor of `block`.
    chunk: keys (forward) or queries (backward) that are computed at a time.
    vmem: bytes of VMEM that the kernel may use.
  """

  heads: int
  block: int
  rows: int
  chunk: int
  vmem: int = 32 * 2**20


def forward(q: jax.Array, k: jax.Array, segments: bool) -> Plan:
  """Return the plan of the forward kernel for q and k [B, H, N, D]."""
  n, m = q.shape[2], k.shape[2]
  if segments:
    # Small parts, of which more can be skipped.
    rows = n if n <= 128 else min(128, _up(-(-n // 2), 16))
    block = n if n <= 128 else 2 * rows
    return Plan(_heads(q, k, 2), block, rows, min(m, 256))
  if n <= _SHORT:
    return Plan(_heads(q, k, 2), n, n, min(m, 128))
  return Plan(1, 2 * _SHORT, _SHORT, min(m, 256))


def backward(q: jax.Array, k: jax.Array, segments: bool) -> Plan:
  """Return the plan of the backward kernel for q and k [B, H, N, D]."""
  del segments
  n, m = q.shape[2], k.shape[2]
  if m <= _SHORT:
    block = m
  else:
    # Of blocks that add equally few keys, the largest.
    block = min(range(128, 257, 16), key=lambda b: (_up(m, b), -b))
  return Plan(_heads(q, k, 4), block, block, min(n, 256))


def _heads(q, k, most):
  if q.shape[1] != k.shape[1] or max(q.shape[2], k.shape[2]) > _SHORT:
    return 1
  return math.gcd(q.shape[1], most)


def _up(length, size):
  return -(-length // size) * size
