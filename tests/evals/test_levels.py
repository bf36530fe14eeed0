import dataclasses
import functools

import flax.linen as nn
import numpy as np

from vfm_jax.data import augment, clips
from vfm_jax.data.digits import Digits
from vfm_jax.data.pipeline import Pipeline
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


def test_each_expert_is_scored_at_its_own_levels():
  one = Denoise(
    Constant(), Gaussian(variance='small'), data='video', label=None
  )
  both = Experts((one, dataclasses.replace(one)), uniform(2))
  data = Pipeline(
    Digits(split='val', val_per_class=1),
    functools.partial(clips.uniform, frames=1),
    augment.identity,
    path='data.val',
  )
  evaluator = Difficulty(data, Intervals((0, 500, 700, 1000)), batch_size=10)

  def losses(objective, *values):
    params = [{'denoiser': {'value': np.float32(v)}} for v in values]
    named = {f'expert_{i}': p for i, p in enumerate(params)}
    given = named if objective is both else params[0]
    return list(evaluator.run(objective, given, seed=0).values())

  clean, noisy = losses(one, 1.0), losses(one, -2.0)
  assert losses(both, 1.0, -2.0) == [clean[0], noisy[1], noisy[2]]
