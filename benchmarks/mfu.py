"""Tell what part of the devices' peak the train steps of recipes use.

On accelerators it is measured, with random batches of the recipe's shapes. On
a CPU machine it is the estimate of the TPU compiler for v5e:16x16, which needs
the extra `tpu`.
"""

import pathlib
import time
from typing import Any

import jax
import numpy as np

from benchmarks import results
from vfm_jax import ahead, config, sharding, topology
from vfm_jax.experiment import Experiment

# Examples a device, and microbatches.
RECIPES = {
  'videomae_l': (16, 1),
  'dit_xl2': (16, 1),
  'switch_dit:xl2': (16, 1),
}
TARGET = 'v5e:16x16'
CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
STEPS = 10


def run(rounds: int) -> results.Rates:
  """Measure each recipe, or estimate it."""
  device = jax.devices()[0]
  if device.platform == 'cpu':
    return _estimated()
  values, info = {}, {}
  for name in RECIPES:
    exp = experiment(name, jax.device_count())
    seconds = _measured(exp, rounds)
    work = ahead.model_flops(exp) / jax.device_count()
    peak = topology.peak_flops(device.device_kind)
    values[name] = [100 * work / s / peak for s in seconds]
    info[name] = {
      'seconds': seconds,
      'batch_size': exp.batch_size,
      'examples_per_s': [exp.batch_size / s for s in seconds],
      'flops_a_device': work,
    }
  return results.Rates(
    title='train step, measured',
    unit='% MFU',
    values=values,
    notes=(
      f'{jax.device_count()} x {device.device_kind}, jax {jax.__version__}, '
      f'random batches, blocks of {STEPS} steps.'
    ),
    info=info,
  )


def experiment(name: str, devices: int) -> Experiment:
  """Return a recipe laid out for a number of devices."""
  recipe, _, variant = name.partition(':')
  c = config.load(f'{CONFIGS}/{recipe}.py:{variant}')
  each, c.accum = RECIPES[name]
  c.batch_size = each * devices
  c.mesh.fsdp = min(c.mesh.fsdp, devices)
  return config.build(c)


def _estimated() -> results.Rates:
  target = topology.parse(TARGET)
  found = {
    name: ahead.analyse(experiment(name, target.devices), target)
    for name in RECIPES
  }
  fitting = {n: f for n, f in found.items() if f['fits']}
  return results.Rates(
    title=f'train step on {TARGET}, ESTIMATED by the compiler',
    unit='% MFU',
    values={n: [100 * f['mfu']] for n, f in fitting.items()},
    notes=(
      'Nothing ran: cycles of the compiled step, without collectives and '
      'waiting for memory. Not counted: '
      + '; '.join(f'{n}: {_left_out(f)}' for n, f in fitting.items())
      + '. Does not fit: '
      + (', '.join(sorted(set(found) - set(fitting))) or 'none')
      + '.'
    ),
    info=found,
  )


def _left_out(found: dict[str, Any]) -> str:
  kernels = found['kernels'].items()
  names = [n for n, k in kernels if not k['counted']]
  return ', '.join(names) or 'nothing'


def _measured(exp: Experiment, rounds: int) -> list[float]:
  """Return seconds a step, of each round."""
  mesh = sharding.make_mesh(exp.mesh)
  with sharding.activations(mesh):
    state = exp.first_state(exp.shardings(mesh))
    batch = sharding.put_batch(random_batch(exp.batch_spec), mesh)
    step = exp.jitted_step(mesh)
    teachers = exp.teachers(mesh)
    seconds = []
    for _ in range(rounds + 1):  # the first compiles
      begin = time.perf_counter()
      for _ in range(STEPS):
        state, metrics = step(state, batch, teachers)
      jax.block_until_ready(metrics)
      seconds.append((time.perf_counter() - begin) / STEPS)
  return seconds[1:]


def random_batch(spec: Any) -> Any:
  """Return arrays of the shapes and types of a batch."""
  rng = np.random.default_rng(0)

  def draw(path: Any, leaf: Any) -> np.ndarray:
    if path[-1].key in ('row', 'index'):
      return np.arange(leaf.shape[0], dtype=leaf.dtype)
    if np.issubdtype(leaf.dtype, np.floating):
      return rng.standard_normal(leaf.shape).astype(leaf.dtype)
    high = 256 if leaf.dtype == np.uint8 else 2
    return rng.integers(0, high, leaf.shape, leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, spec)
