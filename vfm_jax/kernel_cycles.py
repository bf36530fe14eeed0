"""Look up what a run of an attention kernel takes in a table of schedules.

The compiler of TPUs schedules a kernel statically, but tells the cycles of the
whole step without it. A table, JSON, gives for each kind of target rows such as
`{"kernel": "flash_tpu_forward", "queries": 160, "keys": 160, "head_dim": 64,
"cycles": 1234.5}`, with the cycles of one head of one example.
"""

import json
import pathlib
from typing import Any

from vfm_jax import hlo_cost, topology


def load(path: str, target: topology.Target) -> hlo_cost.KernelCycles:
  """Return what says the cycles of kernels on a target.

  Args:
    path: of the table.
    target: whose kind, as 'v5e', is looked up.

  Raises:
    OSError: the table cannot be read.
    ValueError: it is no such table.
  """
  kind = target.name.partition(':')[0]
  table = json.loads(pathlib.Path(path).read_text())
  columns = ('kernel', 'queries', 'keys', 'head_dim', 'cycles')
  try:
    rows = [[row[c] for c in columns] for row in table.get(kind, [])]
  except (AttributeError, KeyError, TypeError) as e:
    raise ValueError(
      f'--schedules={path}: expected {{"{kind}": [rows]}} with {columns} in '
      f'each row, found {str(table)[:200]}'
    ) from e
  cycles = {tuple(row[:4]): float(row[4]) for row in rows}

  def look_up(kernel: hlo_cost.Kernel) -> float | None:
    sizes = _sizes(kernel)
    a_head = cycles.get((kernel.name, *sizes[2:])) if sizes else None
    return None if a_head is None else a_head * sizes[0] * sizes[1]

  return look_up


def _sizes(kernel: hlo_cost.Kernel) -> Any:
  """Return B, H, N, M and D of a kernel of q [B, H, N, D], k [B, K, M, D]."""
  found = [x.dims for x in kernel.operands if len(x.dims) == 4]
  if len(found) < 2:
    return ()
  (batch, heads, queries, dim), (_, _, keys, _) = found[:2]
  return batch, heads, queries, keys, dim
