"""Check that steps go through what draws their times, tasks and stages."""

import functools

import flax.linen as nn
import jax
import numpy as np
import optax

from vfm_jax import step
from vfm_jax.objectives.denoise import Denoise
from vfm_jax.ops.curriculum import Curriculum
from vfm_jax.ops.diffusion import Gaussian
from vfm_jax.ops.intervals import uniform

BATCH = {
  'image': np.random.default_rng(0).integers(0, 256, (16, 4, 4, 1), np.uint8),
  'row': np.arange(16, dtype=np.int32),
}


class Linear(nn.Module):
  """Predict each pixel from itself."""

  channels: int = 1

  @nn.compact
  def __call__(self, x, t, y=None, *, drop=None, tau=None, keys=None):
    return nn.Dense(1)(x)


def test_stages_in_training():
  times = Curriculum(uniform(4), stage_steps=2, strata=uniform(2))
  objective = Denoise(
    Linear(),
    Gaussian(variance='small'),
    label=None,
    times=times,
    tasks=uniform(4),
  )
  tx = optax.sgd(0.01)
  state = jax.jit(functools.partial(step.init_state, objective, tx))(0, BATCH)
  train = jax.jit(step.make_train_step(objective, tx, accum=2))
  stages, active, kept = [], [], []
  for _ in range(8):
    kept.append(jax.device_get(state))
    state, metrics = train(state, BATCH)
    stages.append(int(metrics['curriculum_stage']))
    active.append([float(metrics[f'loss_task{k}']) > 0 for k in range(4)])
  assert stages == [1, 1, 2, 2, 3, 3, 4, 4]
  # The cleanest levels come last.
  assert active[0] == active[1] == [False, False, False, True]
  assert not any(row[0] for row in active[:6])
  assert train._cache_size() == 1
  # A stage goes on from a state that was saved in its middle.
  again = kept[5]
  for _ in range(3):
    again, _ = train(again, BATCH)
  jax.tree.map(np.testing.assert_array_equal, again.extra, state.extra)
  jax.tree.map(np.testing.assert_array_equal, again.params, state.params)
