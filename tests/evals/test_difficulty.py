import functools

import flax.linen as nn
import numpy as np
import pytest

from vfm_jax import sharding
from vfm_jax.data import augment, clips
from vfm_jax.data.digits import Digits
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.evals import base
from vfm_jax.evals.difficulty import Difficulty
from vfm_jax.objectives.denoise import Denoise
from vfm_jax.ops.curriculum import Curriculum
from vfm_jax.ops.diffusion import Gaussian
from vfm_jax.ops.interpolants import Interpolant
from vfm_jax.ops.intervals import Intervals, uniform

DATA = Pipeline(
  Digits(split='val', val_per_class=4),
  functools.partial(clips.uniform, frames=1),
  augment.identity,
  path='data.val',
)


class Level(nn.Module):
  """Answer with the noise level, in thousands."""

  label_dropout: float = 0.0
  channels: int = 1

  @nn.compact
  def __call__(self, x, t, y=None, *, drop=None, tau=None, keys=None):
    scale = self.param('scale', nn.initializers.zeros, ())
    return scale * tau.reshape(-1, *(1,) * (x.ndim - 1)) / 1000 + 0 * x


@pytest.mark.parametrize(
  'process', [Gaussian(variance='small'), Interpolant(prediction='noise')]
)
def test_scores_each_interval(process):
  objective = Denoise(
    Level(),
    process,
    data='video',
    label=None,
    times=Curriculum(uniform(2)),
    tasks=uniform(3),
  )
  evaluator = Difficulty(DATA, Intervals((0, 10, 500, 1000)), 30, 20)
  assert isinstance(evaluator, base.Evaluator)
  params = {'denoiser': {'scale': np.float32(0.0)}}
  zero = evaluator.run(objective, params, seed=0)
  assert list(zero) == ['loss30_0-9', 'loss30_10-499', 'loss30_500-999']
  # The squared noise.
  np.testing.assert_allclose(list(zero.values()), 1, atol=0.1)
  assert evaluator.run(objective, params, seed=0) == zero
  params['denoiser']['scale'] = np.float32(1.0)
  one = evaluator.run(objective, params, seed=0)
  rise = [one[name] - zero[name] for name in zero]
  np.testing.assert_allclose(rise, [0, 1 / 12, 7 / 12], atol=0.1)


def test_a_batch_may_be_split_over_devices():
  objective = Denoise(Level(), Interpolant(), data='video', label=None)
  evaluator = Difficulty(DATA, uniform(2), count=16, batch_size=16)
  params = {'denoiser': {'scale': np.float32(0.5)}}
  mesh = sharding.make_mesh(sharding.Mesh())
  whole = evaluator.run(objective, params, seed=0)
  split = evaluator.run(objective, params, seed=0, mesh=mesh)
  for name, loss in whole.items():
    np.testing.assert_allclose(split[name], loss, rtol=1e-5)


def test_refuses():
  with pytest.raises(TypeError, match=r'Difficulty needs config.objective'):
    Difficulty(DATA).run(object(), {}, seed=0)
  few = Denoise(Level(), Gaussian(steps=5, variance='small'), data='video')
  with pytest.raises(ValueError, match=r'`difficulty.intervals`'):
    Difficulty(DATA).run(few, {}, seed=0)
