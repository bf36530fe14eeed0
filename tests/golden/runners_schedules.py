"""Run the recorded schedules and parameter tables of the official code.

Each runner takes the sidecar and the arrays of a case and returns what this
library computes for every `out64/` array, driven by the sidecar.
"""

import math
import re

import jax
import numpy as np

from vfm_jax import schedules
from vfm_jax.optim import Optimizer


def run_a_videomae_schedules(meta: dict, arrays: dict) -> dict:
  del arrays
  cfg = meta['config']
  _check_table(cfg)
  out = {}
  for i, s in enumerate(cfg['schedules']):
    total = s['epochs'] * s['niter_per_ep']
    warmup = s.get('warmup_epochs', 0) * s['niter_per_ep']
    if s.get('warmup_steps', 0) > 0:
      warmup = s['warmup_steps']
    out[f'out64/schedule_{i}'] = schedules.warmup_cosine(
      np.arange(total),
      total,
      peak=s['base_value'],
      final=s['final_value'],
      start=s.get('start_warmup_value', 0.0),
      warmup_steps=warmup,
      ramp=schedules.closed_ramp,
    )
  return out


def _check_table(cfg: dict) -> None:
  """Compare decay and rate of each parameter of the fine-tuning model."""
  paths = {name: _path(name) for name in cfg['param_table']}
  optimizer = Optimizer(
    lr=schedules.constant,
    weight_decay=cfg['weight_decay'],
    layer_decay=cfg['layer_decay'],
  )
  flat = {
    path: jax.ShapeDtypeStruct(_shape(name), np.float32)
    for name, path in paths.items()
  }
  rows = {row.path: row for row in optimizer.build(flat, 1)[1]}
  for name, expected in cfg['param_table'].items():
    row = rows[paths[name]]
    assert row.weight_decay == expected['weight_decay'], name
    assert math.isclose(row.lr_scale, expected['lr_scale'], rel_tol=1e-12), name


def _path(name: str) -> str:
  """Return our path of an official name, for example of blocks.0.norm1."""
  path = re.sub(r'^blocks\.(\d+)\.', r'blocks_\1.', name).replace('.', '/')
  leaf = 'scale' if 'norm' in name else 'kernel'
  return re.sub(r'weight$', leaf, path)


def _shape(name: str) -> tuple[int, ...]:
  one = 'norm' in name or 'gamma' in name or name.endswith('bias')
  return (2,) if one else (2, 2)
