"""Check that a sample is its key's and label's alone, however it is drawn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax import samplers, sharding, solvers
from vfm_jax.models.dit import DiT
from vfm_jax.ops import noise
from vfm_jax.ops.diffusion import Gaussian, unit_range
from vfm_jax.ops.interpolants import Interpolant
from vfm_jax.ops.runge_kutta import Fixed
from vfm_jax.sampling import Sampling

SHAPE, COUNT = (8, 8, 1), 8
GAUSSIAN = Gaussian(schedule=noise.cosine, predicts='v')
SAMPLERS = {
  'ddim': (GAUSSIAN, functools.partial(samplers.ddim, steps='4')),
  'ddpm': (
    GAUSSIAN,
    functools.partial(samplers.ddpm, steps='4', restrict=unit_range),
  ),
  'ode': (
    Interpolant(),
    functools.partial(solvers.ode, solver=Fixed('heun'), num_steps=4),
  ),
  'sde': (Interpolant(), functools.partial(solvers.sde, num_steps=4)),
}


@pytest.mark.parametrize(
  'name',
  [
    'ddim',
    pytest.param('sde', marks=pytest.mark.slow),
    pytest.param('ddpm', marks=pytest.mark.slow),
    pytest.param('ode', marks=pytest.mark.slow),
  ],
)
def test_batches_and_devices_change_nothing(name):
  process, sampler = SAMPLERS[name]
  network = DiT(
    width=32,
    depth=1,
    heads=2,
    patch=4,
    input_size=8,
    channels=1,
    num_classes=4,
  )
  x = jnp.zeros((1, *SHAPE))
  shapes = jax.eval_shape(
    network.init, jax.random.key(0), x, jnp.zeros(1), jnp.zeros(1, int)
  )
  # At first the output is zero: any other weights do.
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda p: np.float32(0.1 * rng.normal(size=p.shape)), shapes
  )
  sampling = Sampling(sampler=sampler, scale=1.5)

  @jax.jit
  def draw(batch):
    return sampling.draw(
      lambda x, t, y: network.apply(params, x, process.model_time(t), y),
      process,
      batch['keys'],
      SHAPE,
      batch['y'],
      network.null_label,
    )

  batch = {
    'keys': jax.random.split(jax.random.key(7), COUNT),
    'y': jnp.arange(COUNT) % 4,
  }
  whole = np.asarray(draw(batch))
  assert whole.std(0).min() > 0.1  # samples differ

  # Seven samples, and one by itself.
  parts = [
    draw(jax.tree.map(lambda a: a[i : i + 7], batch))  # noqa: B023
    for i in (0, 7)
  ]
  np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-5)
  mesh = sharding.make_mesh(sharding.Mesh(data=8))
  sharded = draw(jax.device_put(batch, sharding.batch_sharding(mesh)))
  np.testing.assert_allclose(np.asarray(sharded), whole, atol=1e-5)


@pytest.mark.parametrize(('name', 'other'), [('ddim', 'ode'), ('sde', 'ddpm')])
def test_a_sampler_of_another_process_is_refused(name, other):
  sampling = Sampling(sampler=SAMPLERS[name][1])
  process = SAMPLERS[other][0]
  keys = jax.random.split(jax.random.key(0), 2)
  with pytest.raises(ValueError, match=rf'sampler. {name} .*process. \w+;'):
    sampling.draw(lambda x, t, y: x, process, keys, SHAPE, None, None)


def test_a_sampler_of_ones_own_needs_no_annotation():
  class Still:
    def __call__(self, denoise, process, x, keys):
      return x

  keys = jax.random.split(jax.random.key(0), 2)
  x = Sampling(Still()).draw(lambda x, t, y: x, None, keys, SHAPE, None, None)
  assert x.shape == (2, *SHAPE)
