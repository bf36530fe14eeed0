import functools
import json

import flax.linen as nn
import numpy as np
import pytest
from PIL import Image

from vfm_jax import sharding
from vfm_jax.data import augment, clips
from vfm_jax.data.digits import Digits
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.evals import base, difficulty, level_plots
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


def test_reads_the_curves_of_a_run(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  rows = [
    {
      'step': step,
      'loss': 1.0,
      'hard/loss30_500-999': 1.0 / step,
      'hard/loss30_0-9': 2.0,
      'hard/loss30_10-499': float(step),
    }
    for step in (1, 2, 4)
  ]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  curves = difficulty.read_curves(path, 'hard')
  assert curves.bounds == (0, 10, 500, 1000)
  expected = [[2, 1, 1], [2, 2, 0.5], [2, 4, 0.25]]
  np.testing.assert_array_equal(curves.losses, expected)
  with pytest.raises(ValueError, match="evaluator named 'easy'"):
    difficulty.read_curves(path, 'easy')


def test_when_losses_have_converged():
  losses = np.array([[1.0, 1, 1], [0.5, 1, 0], [0.5, 2, 0.5], [0, 1, 0]])
  got = difficulty.steps_to_converge(np.array([0, 10, 20, 30]), losses)
  np.testing.assert_allclose(got, [28, np.nan, 9])


def test_relative_entropy_is_that_of_normal_marginals():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(50, 3)) @ rng.normal(size=(3, 3)) + [1, -2, 0.5]
  alpha, sigma = np.array([0.9, 0.5, 0.1]), np.array([0.3, 0.8, 0.95])
  got = difficulty.relative_entropy(x, alpha, sigma)
  cov = np.cov(x.T, bias=True)
  for i in range(2):
    a, b = (alpha[j] ** 2 * cov + sigma[j] ** 2 * np.eye(3) for j in (i, i + 1))
    inverse = np.linalg.inv(b)
    gap = (alpha[i + 1] - alpha[i]) * x.mean(0)
    kl = np.trace(inverse @ a) - 3 + gap @ inverse @ gap
    kl += np.linalg.slogdet(b)[1] - np.linalg.slogdet(a)[1]
    np.testing.assert_allclose(got[i], kl / 2 / 3)
  # Fewer examples than dimensions.
  wide = np.concatenate([x[:2], np.ones((2, 5))], axis=1)
  got = difficulty.relative_entropy(wide, alpha, sigma)
  cov = np.cov(wide.T, bias=True)
  a, b = (alpha[j] ** 2 * cov + sigma[j] ** 2 * np.eye(8) for j in (0, 1))
  gap = (alpha[1] - alpha[0]) * wide.mean(0)
  kl = np.trace(np.linalg.inv(b) @ a) - 8 + gap @ np.linalg.inv(b) @ gap
  kl += np.linalg.slogdet(b)[1] - np.linalg.slogdet(a)[1]
  np.testing.assert_allclose(got[0], kl / 2 / 8)


def test_clean_steps_of_digits_differ_most():
  with DATA.eval_batches(40) as found:
    x = next(found)['video'] / 127.5 - 1
  abar = Gaussian().tables.abar
  got = difficulty.relative_entropy(x, np.sqrt(abar), np.sqrt(1 - abar))
  assert np.all(got >= 0)
  thirds = [part.sum() for part in np.array_split(got, 3)]
  assert thirds[0] > 10 * thirds[1] > 10 * thirds[2]


def test_picture(tmp_path):
  losses = np.exp(-np.arange(1, 5)[:, None] * [0.1, 0.5])
  out = level_plots.interval_curves(
    np.arange(4), losses, (0, 500, 1000), tmp_path / 'x.png'
  )
  with Image.open(out) as picture:
    assert min(picture.size) > 300
