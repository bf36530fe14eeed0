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
  """Size the blocks of a kernel, whose grid is (B, H / heads, blocks).

  Attributes:
    heads: heads a grid step.
    block: queries (forward) or keys (backward) a grid step.
    rows: those of them that are computed at a time, a divisor of `block`.
    chunk: keys (forward, only with segment ids) or queries (backward) that are
      computed at a time.
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
  if n <= 128:
    rows = block = n
  else:
    rows = min(128, _up(-(-n // 2), 16))
    block = 2 * rows
  return Plan(_heads(q, k), block, rows, min(m, 512) if segments else m)


def backward(q: jax.Array, k: jax.Array, segments: bool) -> Plan:
  """Return the plan of the backward kernel for q and k [B, H, N, D]."""
  del segments
  n, m = q.shape[2], k.shape[2]
  if m <= _SHORT:
    block = m
  else:
    # Of blocks that add equally few keys, the largest.
    block = min(range(128, 257, 16), key=lambda b: (_up(m, b), -b))
  return Plan(_heads(q, k), block, block, min(n, 256))


def _heads(q, k):
  if q.shape[1] != k.shape[1] or max(q.shape[2], k.shape[2]) > _SHORT:
    return 1
  return math.gcd(q.shape[1], 4)


def _up(length, size):
  return -(-length // size) * size
