"""Measure how many images a second the samplers draw, on the devices there are.

Guided samples of 32 x 32 x 4 latents: of DiT-S/2, four at a time, on a CPU; of
DiT-XL/2, 64 a device, elsewhere.
"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp

from benchmarks import results
from vfm_jax import samplers, sharding, solvers
from vfm_jax.models.dit import DiT
from vfm_jax.objectives.denoise import Denoise
from vfm_jax.ops.diffusion import Gaussian
from vfm_jax.ops.interpolants import Interpolant
from vfm_jax.sampling import Sampling

SHAPE, SCALE = (32, 32, 4), 4.0


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Name a way to draw, and how noise enters."""

  process: Gaussian | Interpolant
  draw: functools.partial


SAMPLERS = {
  'DPM-Solver++, 20 steps': Sampler(
    Gaussian(), functools.partial(samplers.dpm_solver, steps='20')
  ),
  'DDIM, 50 steps': Sampler(
    Gaussian(), functools.partial(samplers.ddim, steps='50')
  ),
  'SDE, 50 steps': Sampler(
    Interpolant(), functools.partial(solvers.sde, num_steps=50)
  ),
}


def run(rounds: int) -> results.Rates:
  """Measure each sampler."""
  device = jax.devices()[0]
  on_cpu = device.platform == 'cpu'
  size, count = ('S', 4) if on_cpu else ('XL', 64 * jax.device_count())
  dtype = 'float32' if on_cpu else 'bfloat16'
  mesh = sharding.make_mesh(sharding.Mesh())
  model = DiT(size=size, scan=not on_cpu, dtype=dtype)
  labels = jnp.arange(count)
  keys = jax.random.split(jax.random.key(1), count)
  drawers, params = {}, None
  with sharding.activations(mesh):
    for name, sampler in SAMPLERS.items():
      objective = Denoise(
        model,
        process=sampler.process,
        sampling=Sampling(sampler=sampler.draw, scale=SCALE),
      )
      if params is None:
        batch = {
          'image': jnp.zeros((1, *SHAPE)),
          'labels': {'label': labels[:1]},
        }
        init = jax.jit(
          lambda rng, batch, o=objective: o.init(rng, batch)[0],
          out_shardings=sharding.replicated(mesh),
        )
        params = init(jax.random.key(0), batch)
      drawers[name] = jax.jit(
        lambda params, keys, labels, o=objective: o.draw(
          params, keys, SHAPE, labels
        )
      )
    given = (
      params,
      *jax.device_put((keys, labels), sharding.batch_sharding(mesh)),
    )
    for draw in drawers.values():
      jax.block_until_ready(draw(*given))  # compiles
    rates: dict[str, list[float]] = {name: [] for name in drawers}
    for _ in range(rounds):
      for name, draw in drawers.items():
        begin = time.perf_counter()
        jax.block_until_ready(draw(*given))
        rates[name].append(count / (time.perf_counter() - begin))
  return results.Rates(
    title=f'sampling of DiT-{size}/2, guided, {count} at a time',
    unit='images/s',
    values=rates,
    notes=(
      f'Latents, without the autoencoder, {dtype}, on {jax.device_count()} x '
      f'{device.device_kind}, jax {jax.__version__}.'
    ),
    info={'device': device.device_kind, 'jax': jax.__version__},
  )
