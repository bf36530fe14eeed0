"""Check how tasks are combined, on linear fits that pull apart."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vfm_jax import (
  checkpoint,
  config,
  flops,
  multitask,
  optim,
  schedules,
  sharding,
  verbs,
)
from vfm_jax import step as step_lib
from vfm_jax.objectives import base
from vfm_jax.ops import intervals, strata, tasks

TASKS = 3
COMBINERS = {
  'uw': multitask.UncertaintyWeighting(start=0.3),
  'pcgrad': multitask.PCGrad(mean=True),
  'nash': multitask.Nash(every=2, clip_norm=0.5),
}
each_combiner = pytest.mark.parametrize('name', COMBINERS)


@dataclasses.dataclass(frozen=True)
class Fit:
  """Fit y = x w; each example is of a task."""

  tasks: int = TASKS
  aux: float = 0.05

  def init(self, rng, batch):
    return {'w': jax.random.normal(rng, (batch['x'].shape[-1],))}, {}

  def loss(self, params, extra, batch, rng, *, train):
    del rng, train
    error = jnp.square(batch['x'] @ params['w'] - batch['y'])
    members = jax.nn.one_hot(batch['task'], self.tasks, axis=0)
    return base.LossOut(
      sums=(members * error).sum(1),
      counts=members.sum(1),
      aux=self.aux * jnp.sum(jnp.square(params['w'])),
      extra=extra,
    )

  after_update = base.keep_extra


def batch_of(*counts):
  """Return as many examples of each task, whose targets oppose each other."""
  task = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
  rng = np.random.default_rng(1)
  x = rng.normal(size=(len(task), 4)) + 1
  return {
    'x': x.astype(np.float32),
    'y': (rng.normal(size=len(task)) + 6 * (-1) ** task).astype(np.float32),
    'task': task,
    'row': np.arange(len(task), dtype=np.int32),
  }


BATCH = batch_of(7, 4, 1)


SGD = optax.sgd(0.01)
solve = jax.jit(tasks.nash)


@functools.cache
def compiled(objective, tx, **kwargs):
  return jax.jit(step_lib.make_train_step(objective, tx, **kwargs))


def start(combine, objective=None, batch=BATCH, tx=SGD, accum=1):
  objective, shared = objective or Fit(), dict(combine=combine, ema=(0.9,))
  state = step_lib.init_state(objective, tx, 0, batch, **shared)
  return state, compiled(objective, tx, accum=accum, **shared)


def run(combine, steps=3, batch=BATCH, **kwargs):
  state, step = start(combine, batch=batch, **kwargs)
  metrics = {}
  for _ in range(steps):
    state, metrics = step(state, batch)
  return state, metrics


def close(one, two, **kwargs):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **kwargs), one, two
  )


def task_gradients(state, objective=None, batch=BATCH):
  """Return losses [K] and their gradients [K, ...], one by one."""
  objective = objective or Fit()

  def losses(params):
    out = objective.loss(params, {}, batch, None, train=True)
    return out.sums / jnp.maximum(out.counts, 1)

  w = {'w': state.params['w']}
  return losses(w), jax.jacrev(losses)(w)['w'], 0.1 * w['w']


@each_combiner
def test_accumulation_is_exact_with_ragged_counts(name):
  combine = COMBINERS[name]
  whole, metrics = run(combine)
  parts, of_parts = run(combine, accum=4)
  close(whole.params, parts.params, rtol=1e-6, atol=1e-6)
  close(whole.combine, parts.combine, rtol=1e-5)
  for key in ('loss', 'loss_task0', 'loss_task2', 'grad_norm'):
    np.testing.assert_allclose(metrics[key], of_parts[key], rtol=1e-5)
  # Averages follow the parameters, whatever the method.
  first, _ = run(combine, steps=0)
  one, _ = run(combine, steps=1)
  want = 0.9 * first.params['w'] + 0.1 * one.params['w']
  np.testing.assert_allclose(one.ema['0.9']['w'], want, rtol=1e-6)
  assert not np.allclose(one.ema['0.9']['w'], first.ema['0.9']['w'])


@each_combiner
def test_a_task_without_examples_is_left_out(name):
  combine, batch = COMBINERS[name], batch_of(7, 5)
  two, of_two = run(combine, batch=batch, objective=Fit(2))
  three, of_three = run(combine, batch=batch, objective=Fit(3))
  np.testing.assert_allclose(two.params['w'], three.params['w'], rtol=1e-5)
  np.testing.assert_allclose(of_two['loss'], of_three['loss'], rtol=1e-5)
  if name == 'uw':
    s = three.params['combine']['log_variance']
    assert s[2] == np.float32(0.3)
    assert np.all(s[:2] != np.float32(0.3))
  if name == 'nash':
    assert three.combine['weights'][2] == 1
    assert three.combine['kept'] == 0


@each_combiner
def test_one_task_is_plain_training(name):
  batch, objective = batch_of(12), Fit(1)
  if name == 'uw':
    # Half the loss and the gradient while the log-variance is 0.
    combine = multitask.UncertaintyWeighting()
    state, step = start(combine, objective, batch)
    (loss,), (grad,), aux = task_gradients(state, objective, batch)
    one, metrics = step(state, batch)
    want = state.params['w'] - 0.01 * (grad / 2 + aux)
    np.testing.assert_allclose(one.params['w'], want, rtol=1e-5)
    aux_loss = 0.05 * np.sum(np.square(state.params['w']))
    np.testing.assert_allclose(metrics['loss'], loss / 2 + aux_loss, rtol=1e-5)
    return
  plain, metrics = run(None, batch=batch, objective=objective)
  got, of_one = run(COMBINERS[name], batch=batch, objective=objective)
  np.testing.assert_allclose(got.params['w'], plain.params['w'], rtol=1e-6)
  np.testing.assert_allclose(of_one['loss'], metrics['loss'], rtol=1e-6)


@each_combiner
def test_state_survives_a_checkpoint(name, tmp_path):
  state, step = start(COMBINERS[name])
  middle, _ = step(state, BATCH)
  assert jax.tree.structure(state) == jax.tree.structure(middle)
  with checkpoint.Checkpointer(str(tmp_path), asynchronous=False) as saved:
    saved.save(1, middle, force=True)
    back = saved.restore(jax.eval_shape(lambda: state))
  straight, resumed = step(middle, BATCH)[0], step(back, BATCH)[0]
  jax.tree.map(np.testing.assert_array_equal, straight, resumed)


def test_uncertainty_weighting_follows_its_formula():
  combine = COMBINERS['uw']
  zero, _ = run(combine, 0)
  one, metrics = run(combine, 1)
  losses, grads, aux = task_gradients(zero)
  s = np.float32(0.3)
  weights = 0.5 * np.exp(-s) / TASKS * np.ones(TASKS)
  want = zero.params['w'] - 0.01 * (weights @ grads + aux)
  np.testing.assert_allclose(one.params['w'], want, rtol=1e-5)
  total = (0.5 * (np.exp(-s) * losses / TASKS + s)).sum()
  total += 0.05 * np.sum(np.square(zero.params['w']))
  np.testing.assert_allclose(metrics['loss'], total, rtol=1e-5)
  moved = one.params['combine']['log_variance'] - s
  slope = 0.5 * (1 - np.exp(-s) * losses / TASKS)
  np.testing.assert_allclose(moved, -0.01 * slope, rtol=1e-4)


def test_log_variances_find_the_losses():
  # Where nothing else learns, exp(s_k) goes to L_k / K.
  still = optim.Optimizer(
    lr=functools.partial(schedules.constant, value=0.5),
    method=functools.partial(optim.sgd, momentum=0.0),
    weight_decay=0.0,
    groups=(optim.Group('^w$', freeze=True),),
  )
  combine, objective = COMBINERS['uw'], Fit()
  params, _ = step_lib.init_params(objective, 0, BATCH, combine=combine)
  tx, _ = still.build(params, 1)
  state, _ = run(combine, 100, tx=tx)
  losses, _, _ = task_gradients(state)
  np.testing.assert_allclose(
    np.exp(state.params['combine']['log_variance']), losses / TASKS, rtol=1e-3
  )


def test_pcgrad_steps():
  combine, batch = COMBINERS['pcgrad'], batch_of(7, 5)
  shared = dict(batch=batch, objective=Fit(2))
  zero, _ = run(combine, 0, **shared)
  one, metrics = run(combine, 1, **shared)
  losses, grads, aux = task_gradients(zero, Fit(2), batch)
  (one_g, two_g), dot = grads, grads[0] @ grads[1]
  want = one_g - dot / (two_g @ two_g) * two_g
  want += two_g - dot / (one_g @ one_g) * one_g
  want = want / 2 + aux
  np.testing.assert_allclose(
    one.params['w'], zero.params['w'] - 0.01 * want, rtol=1e-5
  )
  assert metrics['conflicts'] == 1
  aux_loss = 0.05 * np.sum(np.square(zero.params['w']))
  np.testing.assert_allclose(
    metrics['loss'], np.mean(losses) + aux_loss, rtol=1e-5
  )


def test_the_order_of_projections_follows_the_seed_and_the_step():
  @dataclasses.dataclass(frozen=True)
  class Fixed(Fit):
    def loss(self, params, extra, batch, rng, *, train):
      sums = (
        jnp.asarray([[1, 0.2, -0.3], [-0.9, 1, 0.1], [-0.2, -1, 1]])
        @ params['w']
      )
      return base.LossOut(sums, jnp.ones(3), extra=extra)

  shared = dict(objective=Fixed(), batch={'x': np.ones((1, 3))})
  state, step = start(COMBINERS['pcgrad'], tx=optax.sgd(0.0), **shared)

  def norms():
    now, out = state, []
    for _ in range(6):
      now, metrics = step(now, shared['batch'])
      out.append(float(metrics['grad_norm']))
    return out

  assert len(set(norms())) > 1
  assert norms() == norms()


def test_nash_bargains_every_few_steps_and_clips():
  state, step = start(COMBINERS['nash'])
  for i in range(4):
    losses, grads, aux = task_gradients(state)
    if i % 2 == 0:
      alpha, solved = solve(tasks.gram(grads))
      assert solved
    else:
      alpha = state.combine['weights']
    want = alpha @ grads / TASKS + aux
    want *= min(1, 0.5 / np.linalg.norm(want))
    new, metrics = step(state, BATCH)
    np.testing.assert_allclose(new.combine['weights'], alpha, rtol=1e-4)
    np.testing.assert_allclose(
      new.params['w'], state.params['w'] - 0.01 * want, rtol=1e-5
    )
    aux_loss = 0.05 * np.sum(np.square(state.params['w']))
    np.testing.assert_allclose(
      metrics['loss'], alpha @ losses / TASKS + aux_loss, rtol=1e-5
    )
    assert metrics['grad_norm'] <= 0.5 * (1 + 1e-6)
    state = new


def test_nash_keeps_its_weights_where_a_gradient_vanishes():
  still = dict(BATCH, x=np.where(BATCH['task'][:, None] == 1, 0, BATCH['x']))
  combine = multitask.Nash(every=1, clip_norm=None)
  state, step = start(combine)
  healthy, _ = step(state, BATCH)
  new, metrics = step(healthy, still)
  assert metrics['nash_kept'] == new.combine['kept'] == 1
  assert metrics['skipped'] == 0
  np.testing.assert_array_equal(
    new.combine['weights'], healthy.combine['weights']
  )
  assert not np.allclose(new.params['w'], healthy.params['w'])
  broken = dict(BATCH, y=np.full_like(BATCH['y'], np.nan))
  after, metrics = step(new, broken)
  assert metrics['skipped'] == 1
  assert metrics['nash_kept'] == 2
  jax.tree.map(
    np.testing.assert_array_equal,
    after.replace(step=0),
    new.replace(step=0),
  )


@each_combiner
def test_layout_and_work(name):
  tx = optax.adam(0.1)
  state, step = start(COMBINERS[name], tx=tx)
  rules = (*sharding.RULES, sharding.Rule('w'))
  places = sharding.infer(jax.eval_shape(lambda: state), {'fsdp': 2}, rules)
  assert jax.tree.structure(places) == jax.tree.structure(state)
  batch = batch_of(400, 300, 200)
  plain = flops.count(start(None, tx=tx)[1], start(None, tx=tx)[0], batch)
  passes = 1 if name == 'uw' else TASKS + 1
  # The weights themselves cost nothing to speak of.
  assert flops.count(step, state, batch) <= passes * plain + 3000


def test_a_recipe_names_a_combiner_and_a_group_for_what_it_learns():
  c = config.load(f'{pathlib.Path(__file__).parent}/recipes/tiny_denoise.py:')
  four = config.ref(intervals.uniform, count=4)
  group = config.ref(optim.Group, pattern='^combine/', lr_scale=25.0)
  with c.unlocked():
    c.combine = config.ref(multitask.UncertaintyWeighting)
    c.objective.tasks = four
    c.objective.times = config.ref(strata.Stratified, intervals=four)
    c.optim.groups = (group,)
  described = verbs.describe(config.build(c), 8).data
  (row,) = [
    p for p in described['parameters'] if p['path'] == 'combine/log_variance'
  ]
  assert row['shape'] == [4]
  assert row['lr_scale'] == 25
  assert row['weight_decay'] == 0


def test_errors_name_what_to_change():
  with pytest.raises(ValueError, match=r'combine\.every'):
    multitask.Nash(every=0)
  with pytest.raises(ValueError, match=r'combine\.clip_norm'):
    multitask.Nash(clip_norm=0.0)

  @dataclasses.dataclass(frozen=True)
  class Clash(Fit):
    def init(self, rng, batch):
      return {'combine': {}, 'w': jnp.zeros(4)}, {}

  with pytest.raises(ValueError, match=r"config\.combine.*'combine'"):
    start(COMBINERS['uw'], Clash())


def test_a_combiner_needs_tasks_and_what_it_learns():
  c = config.load(f'{pathlib.Path(__file__).parent}/recipes/tiny_denoise.py:')
  with c.unlocked():
    c.combine = config.ref(multitask.UncertaintyWeighting)
  with pytest.raises(
    config.ConfigError, match=r'config\.objective\.tasks.*None'
  ):
    config.build(c)
  with c.unlocked():
    c.objective.tasks = config.ref(intervals.uniform, count=4)
    c.optim.groups = (config.ref(optim.Group, pattern='.', freeze=True),)
  with pytest.raises(ValueError, match=r"combine/log_variance.*groups.*'\.'"):
    config.build(c).optimizer  # noqa: B018


def test_training_has_the_tasks_of_an_evaluation():

  @dataclasses.dataclass(frozen=True)
  class Other(Fit):
    def loss(self, params, extra, batch, rng, *, train):
      same = super().loss(params, extra, batch, rng, train=train)
      return same.replace(sums=same.sums[:2]) if not train else same

  for name in ('uw', 'nash'):
    state, step = start(COMBINERS[name], Other())
    with pytest.raises(ValueError, match=r'config\.combine.* 3 tasks'):
      step(state, BATCH)
