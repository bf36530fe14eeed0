import dataclasses
import functools

import flax.linen as nn
import numpy as np

from vfm_jax.data import augment, clips
from vfm_jax.data.digits import Digits
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.evals.affinity import TaskAffinity
from vfm_jax.evals.difficulty import Difficulty
from vfm_jax.objectives.denoise import Denoise
from vfm_jax.objectives.experts import Experts
from vfm_jax.ops.diffusion import Gaussian
from vfm_jax.ops.intervals import Intervals, uniform


class Constant(nn.Module):
  """Answer with one number."""

  label_dropout: float = 0.0
  channels: int = 1
  out_channels: int = 1
  num_classes: int = 0
  null_label: int | None = None

  @nn.compact
  def __call__(self, x, t, y=None, *, drop=None, tau=None, keys=None):
    return self.param('value', nn.initializers.zeros, ()) + 0 * x


ONE = Denoise(Constant(), Gaussian(variance='small'), data='video', label=None)
BOTH = Experts((ONE, dataclasses.replace(ONE)), uniform(2))
DATA = Pipeline(
  Digits(split='val', val_per_class=1),
  functools.partial(clips.uniform, frames=1),
  augment.identity,
  path='data.val',
)


def params_of(*values):
  params = [{'denoiser': {'value': np.float32(v)}} for v in values]
  return {f'expert_{i}': p for i, p in enumerate(params)}


def test_each_expert_is_scored_at_its_own_levels():
  evaluator = Difficulty(DATA, Intervals((0, 500, 700, 1000)), batch_size=10)

  def losses(objective, *values):
    params = params_of(*values)
    given = params if objective is BOTH else params['expert_0']
    return list(evaluator.run(objective, given, seed=0).values())

  clean, noisy = losses(ONE, 1.0), losses(ONE, -2.0)
  assert losses(BOTH, 1.0, -2.0) == [clean[0], noisy[1], noisy[2]]


def test_levels_of_two_experts_share_no_gradient():
  evaluator = TaskAffinity(DATA, levels=4, batch_size=10, sketch=None)
  found = evaluator.run(BOTH, params_of(1.0, -2.0), seed=0)
  # Of one number, gradients agree wholly.
  want = {'near': 2 / 3, 'all': 2 / 6, 'least': 0.0}
  for name, value in want.items():
    np.testing.assert_allclose(found[f'affinity_4x10_{name}'], value)
