"""Run the recorded masks, tables and schedules of V-JEPA and V-JEPA 2.

Each runner takes the sidecar and the arrays of a case and returns what this
library computes for every array to check, driven by the sidecar.
"""

import functools
import re

import numpy as np

from vfm_jax import schedules
from vfm_jax.objectives import latent
from vfm_jax.ops import blocks, positions


class Draws:
  """Draw as torch does on a CPU from one seed (Mersenne Twister)."""

  def __init__(self, seed: int):
    self._bits = np.random.RandomState(seed)

  def uniform(self, count: int) -> np.ndarray:
    """Return numbers in [0, 1) with 24 bits."""
    words = [self._word() & (2**24 - 1) for _ in range(count)]
    return np.array(words) / 2**24

  def below(self, end: int) -> int:
    return self._word() % end

  def _word(self):
    return int.from_bytes(self._bits.bytes(4), 'little')


def run_c_vjepa_multiblock_mask(meta: dict, arrays: dict) -> dict:
  out = {}
  sizes = [
    Draws(seed).uniform(3)
    for seed in range(len(arrays['in64/torch_uniforms_seed0_63']))
  ]
  np.testing.assert_array_equal(sizes, arrays['in64/torch_uniforms_seed0_63'])
  for cfg in meta['config']:
    side = cfg['crop_size'] // cfg['patch_size']
    grid = (cfg['num_frames'] // cfg['tubelet_size'], side, side)
    draws = Draws(cfg['torch_manual_seed'])
    tables = [
      blocks.block_size(np.stack(sizes), grid, **_ranges(m))
      for m in cfg['masks']
    ]
    tag = cfg['tag']
    out[f'out/{tag}_block_sizes_first64'] = np.stack(tables)
    np.testing.assert_array_equal(np.stack(tables), cfg['block_sizes_used'])
    for step in range(cfg['calls']):
      for i, mask in enumerate(cfg['masks']):
        hidden = _hidden(
          draws,
          tables[i][step],
          grid,
          cfg['batch'],
          mask['num_blocks'],
          mask['max_temporal_keep'],
        )
        both = blocks.cut_to_shortest(hidden, max_context=mask['max_keep'])
        name = f'out/{tag}_it{step}_gen{i}'
        out[f'{name}_enc'], out[f'{name}_pred'] = both
  return out


def run_d_vjepa2_mask_options(meta: dict, arrays: dict) -> dict:
  cfg, out = meta['config'], {}
  side = cfg['crop'] // cfg['patch']
  grid = (cfg['num_frames'] // cfg.get('tubelet', 2), side, side)
  ranges = dict(
    spatial_scale=cfg['spatial_scale'],
    temporal_scale=cfg['temporal_scale'],
    aspect=cfg['aspect'],
  )
  for option in cfg['options']:
    draws = Draws(option['torch_manual_seed'])
    start = f'out/opt{option["index"]}_it'
    steps = {int(n[len(start)]) for n in arrays if n.startswith(start)}
    for step in sorted(steps):
      size = blocks.block_size(Draws(step).uniform(3), grid, **ranges)
      hidden = _hidden(
        draws,
        size,
        grid,
        cfg['batch'],
        option.get('num_blocks', cfg['num_blocks']),
        option.get('max_temporal_keep', 1.0),
      )
      rest = 'none'
      if option.get('full_complement'):
        rest = 'targets'
      elif option.get('pred_full_complement'):
        rest = 'context'
      both = blocks.cut_to_shortest(
        hidden,
        rest=rest,
        inverse=option.get('inv_block', False),
        max_context=option.get('max_keep'),
      )
      out[f'{start}{step}_enc'], out[f'{start}{step}_pred'] = both
  return out


def _ranges(mask):
  return dict(
    spatial_scale=mask['spatial_scale'],
    temporal_scale=mask['temporal_scale'],
    aspect=mask['aspect_ratio'],
  )


def _hidden(draws, size, grid, batch, num_blocks, last_slice):
  """Return the masks of a batch, drawn again while nothing is visible."""
  out = []
  while len(out) < batch:
    corners = []
    for _ in range(num_blocks):
      top, left, start = (
        draws.below(int(grid[i] - size[i] + 1)) for i in (1, 2, 0)
      )
      corners.append((start, top, left))
    hidden = blocks.in_blocks(
      size, np.array(corners), grid, last_slice=last_slice
    )
    if not hidden.all():
      out.append(hidden)
  return np.stack(out)


def run_c_vjepa_schedules(meta: dict, arrays: dict) -> dict:
  cfg = meta['config']
  run = cfg['ipe'] * cfg['num_epochs']

  def table(name, schedule, ahead=1):
    """Return the schedule at every recorded step."""
    steps = np.arange(len(arrays[name]))
    return schedules.stretched(
      steps, run, schedule=schedule, scale=cfg['ipe_scale'], ahead=ahead
    )

  momentum = functools.partial(
    schedules.linear, peak=cfg['ema'][0], final=cfg['ema'][1]
  )
  shared = dict(past_end='extend')
  kept, averages = arrays['in/ema_k0'], []
  for step, new in enumerate(arrays['in/ema_q']):
    m = float(table('out64/ema_momentum', momentum, 0)[step])
    kept = latent.average({'w': kept}, {'w': new}, m)['w']
    averages.append(kept)
  return {
    'out64/lr': table(
      'out64/lr',
      functools.partial(
        schedules.warmup_cosine,
        peak=cfg['lr'],
        final=cfg['final_lr'],
        start=cfg['start_lr'],
        warmup_steps=cfg['warmup_steps'],
        **shared,
      ),
    ),
    'out64/wd': table(
      'out64/wd',
      functools.partial(
        schedules.warmup_cosine,
        peak=cfg['wd'],
        final=cfg['final_wd'],
        **shared,
      ),
    ),
    'out64/ema_momentum': table('out64/ema_momentum', momentum, 0),
    'out/ema_k': np.stack(averages),
  }


def run_d_vjepa2_schedules(meta: dict, arrays: dict) -> dict:
  cfg = meta['config']
  ends = dict(peak=cfg['ref_lr'], final=cfg['final_lr'], past_end='extend')
  return {
    'out64/wsd': schedules.warmup_stable_decay(
      np.arange(len(arrays['out64/wsd'])) + 1,
      cfg['T_max'],
      start=cfg['start_lr'],
      warmup_steps=cfg['warmup_steps'],
      decay_steps=cfg['anneal_steps'],
      **ends,
    ),
    'out64/linear_decay': schedules.linear(
      np.arange(len(arrays['out64/linear_decay'])) + 1,
      cfg['linear_T_max'],
      **ends,
    ),
  }


def run_c_vjepa_sincos(meta: dict, arrays: dict) -> dict:
  del meta
  out = {}
  for name in arrays:
    if found := re.fullmatch(
      r'out64/sincos3d_\d+_dim(\d+)_grid(\d+)_depth(\d+)_uniform([01])', name
    ):
      dim, side, depth, uniform = map(int, found.groups())
      out[name] = positions.sincos_3d(
        (depth, side, side), dim, uniform_power=bool(uniform)
      )
    elif found := re.fullmatch(r'out64/sincos2d_dim(\d+)_grid(\d+)', name):
      dim, side = map(int, found.groups())
      out[name] = positions.sincos_2d((side, side), dim)
    elif found := re.fullmatch(r'out64/sincos1d_dim(\d+)_n(\d+)', name):
      out[name] = positions.sincos_1d(np.arange(int(found[2])), int(found[1]))
  return out
