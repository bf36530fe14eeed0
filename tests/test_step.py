"""Check the step function on a toy objective with two tasks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vfm_jax import step as step_lib
from vfm_jax.objectives import base


@dataclasses.dataclass(frozen=True)
class Toy:
  """Fit y = x w on two tasks with ragged counts and per-example noise."""

  noise: float = 0.1

  def init(self, rng, batch):
    width = batch['x'].shape[-1]
    return {'w': jax.random.normal(rng, (width,))}, {'seen': jnp.zeros(())}

  def loss(self, params, extra, batch, rng, *, train):
    keys = base.example_keys(rng, batch)
    noise = jax.vmap(lambda k: jax.random.normal(k))(keys) * self.noise
    error = jnp.square(batch['x'] @ params['w'] + noise - batch['y'])
    weights = jnp.stack([batch['task'] == 0, batch['task'] == 1])
    weights = weights.astype(jnp.float32)
    return base.LossOut(
      sums=weights @ error,
      counts=weights.sum(axis=1),
      aux=0.01 * jnp.sum(jnp.square(params['w'])),
      metrics={'error': error.mean()},
      extra={'seen': extra['seen'] + batch['x'].shape[0]},
    )

  def after_update(self, extra, params, step, metrics):
    return extra


@pytest.fixture
def batch():
  rng = np.random.default_rng(0)
  return {
    'x': rng.normal(size=(12, 3)).astype(np.float32),
    'y': rng.normal(size=12).astype(np.float32),
    'task': np.array([0] * 9 + [1] * 3, np.int32),
    'row': np.arange(12, dtype=np.int32),
  }


def run(batch, steps=3, *, objective=None, ema=(), **kwargs):
  objective, tx = objective or Toy(), optax.adam(0.1)
  state = step_lib.init_state(objective, tx, 0, batch, ema=ema)
  step = jax.jit(step_lib.make_train_step(objective, tx, ema=ema, **kwargs))
  metrics = {}
  for _ in range(steps):
    state, metrics = step(state, batch)
  return state, metrics


@pytest.mark.parametrize('accum', [2, 3, 4, 12])
def test_accumulation_is_exact_with_ragged_counts(batch, accum):
  whole, metrics = run(batch)
  parts, metrics_parts = run(batch, accum=accum)
  np.testing.assert_allclose(
    whole.params['w'], parts.params['w'], rtol=1e-6, atol=1e-6
  )
  for name in ('loss', 'loss_task0', 'loss_task1', 'error', 'grad_norm'):
    np.testing.assert_allclose(
      metrics[name], metrics_parts[name], rtol=1e-5, err_msg=name
    )
  assert parts.extra['seen'] == whole.extra['seen'] == 36


def test_tasks_may_follow_from_the_state(batch):
  """The second microbatch has its tasks from what the first one left."""

  @dataclasses.dataclass(frozen=True)
  class InTurn(Toy):
    def loss(self, params, extra, batch, rng, *, train):
      turn = (extra['seen'] // 6 % 2).astype(jnp.int32)
      task = jnp.full(len(batch['row']), turn)
      return super().loss(
        params, extra, {**batch, 'task': task}, rng, train=train
      )

  _, metrics = run(batch, steps=1, objective=InTurn(noise=0.0), accum=2)
  w = step_lib.init_state(Toy(), optax.sgd(0.0), 0, batch).params['w']
  error = (batch['x'] @ w - batch['y']) ** 2
  for k in range(2):
    np.testing.assert_allclose(
      metrics[f'loss_task{k}'], error[k::2].mean(), rtol=1e-5
    )


def test_loss_is_the_sum_of_task_means(batch):
  objective = Toy(noise=0.0)
  state = step_lib.init_state(objective, optax.sgd(0.0), 0, batch)
  _, metrics = step_lib.make_train_step(objective, optax.sgd(0.0))(state, batch)
  w = np.asarray(state.params['w'])
  error = (batch['x'] @ w - batch['y']) ** 2
  expected = error[:9].mean() + error[9:].mean() + 0.01 * (w**2).sum()
  np.testing.assert_allclose(metrics['loss'], expected, rtol=1e-6)


def test_batch_that_does_not_divide_is_refused(batch):
  with pytest.raises(ValueError, match=r'batch of 12 .* accum=5'):
    run(batch, accum=5)


def test_averages_follow_the_parameters(batch):
  one, _ = run(batch, steps=1, ema=(0.9, 0.5))
  zero, _ = run(batch, steps=0, ema=(0.9, 0.5))
  for decay, average in ((0.9, one.ema['0.9']), (0.5, one.ema['0.5'])):
    np.testing.assert_allclose(
      average['w'],
      decay * zero.params['w'] + (1 - decay) * one.params['w'],
      rtol=1e-6,
    )


def test_non_finite_gradients_change_nothing_but_the_step(batch):
  before, _ = run(batch, steps=2, ema=(0.9,))
  broken = dict(batch, x=batch['x'].copy())
  broken['x'][0, 1] = np.nan
  tx = optax.adam(0.1)
  step = step_lib.make_train_step(Toy(), tx, ema=(0.9,))
  after, metrics = step(before, broken)
  assert metrics['skipped'] == 1.0
  assert not metrics['finite'][0]
  assert after.step == before.step + 1
  jax.tree.map(
    np.testing.assert_array_equal,
    after.replace(step=0),
    before.replace(step=0),
  )
  healed, metrics = step(after, batch)
  assert metrics['skipped'] == 0.0
  assert np.isfinite(healed.params['w']).all()


def test_randomness_follows_step_and_row_not_the_order(batch):
  order = np.random.default_rng(1).permutation(12)
  moved = {k: v[order] for k, v in batch.items()}
  straight, _ = run(batch)
  shuffled, _ = run(moved)
  np.testing.assert_allclose(
    straight.params['w'], shuffled.params['w'], rtol=1e-5
  )
  losses = {
    float(run(batch, steps=n, objective=Toy(5.0))[1]['loss']) for n in (1, 2)
  }
  assert len(losses) == 2


def test_seeds_differ(batch):
  tx = optax.sgd(0.1)
  one = step_lib.init_state(Toy(), tx, 0, batch)
  two = step_lib.init_state(Toy(), tx, 1, batch)
  assert not np.allclose(one.params['w'], two.params['w'])
  assert not np.array_equal(one.rng, two.rng)
