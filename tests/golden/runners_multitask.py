"""Run the recorded cases of multi-task learning over noise levels.

Each runner takes the sidecar and the arrays of a case and returns what this
library computes for every array to check, driven by the sidecar.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from released import last
from runners_diffusion import SCHEDULES, toy

from vfm_jax import multitask, optim, schedules
from vfm_jax import step as step_lib
from vfm_jax.objectives import base
from vfm_jax.ops import intervals, noise, strata, tasks
from vfm_jax.ops.diffusion import Gaussian

SCHEDULE_NAMES = {**SCHEDULES, 'cosine': noise.cosine}


def run_f_ant_pcgrad(meta: dict, arrays: dict) -> dict:
  del meta
  vector = arrays['in/split/vector']
  (rows, columns), size = arrays['out/split/weight'].shape, len(vector)
  cut = rows * columns

  @jax.jit
  def compute():
    # The gradients of a tree are combined leaf by leaf.
    split = tasks.mix(
      jnp.ones(1),
      {'weight': vector[None, :cut], 'bias': vector[None, cut:size]},
    )
    out = {
      'out/split/weight': split['weight'].reshape(rows, columns),
      'out/split/bias': split['bias'],
    }
    for name, grads in arrays.items():
      case = re.fullmatch(r'in/(.*)/grads', name)
      if case:
        order = jnp.asarray(arrays[f'in/{case[1]}/order'])
        products = tasks.gram(jnp.asarray(grads))
        weights = tasks.projected(products, order, 'all')
        out[f'out/{case[1]}/combined'] = tasks.mix(weights, grads)
    return out

  return compute()


@dataclasses.dataclass(frozen=True)
class Bowls:
  """Learn w with K losses (w - c_k)' Q_k (w - c_k) / 2."""

  start: tuple[float, ...]

  def init(self, rng, batch):
    del rng, batch
    return {'w': jnp.asarray(self.start)}, {}

  def loss(self, params, extra, batch, rng, *, train):
    del rng, train
    away = params['w'] - batch['centres']
    sums = 0.5 * jnp.einsum('ki,kij,kj->k', away, batch['q'], away)
    return base.LossOut(sums, jnp.ones_like(sums), extra=extra)

  after_update = base.keep_extra


def run_f_ant_nash(meta: dict, arrays: dict) -> dict:
  cfg, out = meta['config'], {}
  with jax.enable_x64(True):
    solve = jax.jit(tasks.nash)
    for name, products in arrays.items():
      case = re.fullmatch(r'in/(.*/call\d+)/gram', name)
      if case:
        out[f'out/{case[1]}/alpha'], _ = solve(products)
  rate, seen = 0.05, {'theta': [], 'alpha': [], 'loss': []}
  batch = {'q': arrays['in/call/Q'], 'centres': arrays['in/call/centres']}
  objective = Bowls(tuple(arrays['in/call/theta0'].tolist()))
  combine = multitask.Nash(
    every=cfg['update_weights_every'], clip_norm=cfg['max_norm']
  )
  state = step_lib.init_state(
    objective, optax.sgd(rate), 0, batch, combine=combine
  )
  step = jax.jit(
    step_lib.make_train_step(objective, optax.sgd(rate), combine=combine)
  )
  for _ in arrays['out/call/loss']:
    seen['theta'].append(np.asarray(state.params['w']))
    state, metrics = step(state, batch)
    seen['alpha'].append(np.asarray(state.combine['weights']))
    seen['loss'].append(metrics['loss'])
  out |= {f'out/call/{k}': np.stack(v) for k, v in seen.items()}
  after = np.stack([*seen['theta'][1:], state.params['w']])
  out['out/call/grad'] = (out['out/call/theta'] - after) / rate
  return out


@dataclasses.dataclass(frozen=True)
class Recorded:
  """Learn nothing: losses [K, n] come with the batch."""

  def init(self, rng, batch):
    del rng, batch
    return {'w': jnp.zeros(())}, {}

  def loss(self, params, extra, batch, rng, *, train):
    del rng, train
    sums = batch['losses'].sum(1) + 0 * params['w']
    return base.LossOut(
      sums, jnp.full(len(sums), batch['losses'].shape[1] * 1.0), extra=extra
    )

  after_update = base.keep_extra


@dataclasses.dataclass(frozen=True)
class Replay(Gaussian):
  """Draw the recorded times, which must be where they are asked for."""

  recorded: tuple[int, ...] = ()

  def draw_within(self, keys, low, high):
    t = np.asarray(self.recorded)
    assert t.shape == keys.shape
    assert np.all((t >= low) & (t < high))
    return jnp.asarray(t)


def run_f_ant_uw(meta: dict, arrays: dict) -> dict:
  count = meta['config']['uwK']
  losses = jnp.asarray(arrays['in/per_sample_loss'])
  s = jnp.asarray(arrays['in/loss_scale'])
  total, grads = jax.jit(jax.value_and_grad(_uncertain, (0, 1)))(s, losses)
  draws = arrays['in/t_draws'].reshape(-1)
  times = strata.Stratified(intervals.uniform(count))
  process = Replay(recorded=tuple(draws.tolist()))
  keys = jax.random.split(jax.random.key(0), len(draws))
  path, rows = _adamw(losses.reshape(count, -1), arrays)
  assert rows['combine/log_variance'].weight_decay == 0.0
  return {
    'out/loss': total,
    'grad/loss_scale': grads[0],
    'grad/per_sample_loss': grads[1],
    'out/weights': tasks.uncertainty_weights(s),
    'out/adamw_loss_scale': path,
    'out/t_batch': times.draw(times.init(), keys, process)[0],
  }


def _uncertain(s, losses):
  """Return the loss of examples that are in the order of the tasks."""
  means = losses.reshape(len(s), -1).mean(1)
  return tasks.uncertainty_terms(means / len(s), s).sum()


def _adamw(losses, arrays):
  """Train the log-variances alone, in a group of their own."""
  steps = len(arrays['out/adamw_loss_scale'])
  optimizer = optim.Optimizer(
    lr=functools.partial(schedules.constant, value=1e-4),
    method=functools.partial(optim.adam, b1=0.9, b2=0.999),
    groups=(optim.Group('^combine/', lr_scale=250.0),),
  )
  objective, combine = Recorded(), multitask.UncertaintyWeighting()
  params, _ = step_lib.init_params(
    objective, 0, {'losses': losses}, combine=combine
  )
  tx, rows = optimizer.build(params, steps)
  state = step_lib.init_state(
    objective, tx, 0, {'losses': losses}, combine=combine
  )
  step = jax.jit(step_lib.make_train_step(objective, tx, combine=combine))
  path = []
  for i in range(steps):
    state, _ = step(state, {'losses': losses * (1 + 0.1 * i)})
    path.append(state.params['combine']['log_variance'])
  return np.stack(path), {row.path: row for row in rows}


def run_d_dtr_loss_weights(meta: dict, arrays: dict) -> dict:
  cfg, out = meta['config'], {}
  for name in arrays:
    if found := re.fullmatch(r'out/clusters(?:_(\d+))?', name):
      count = int(found[1] or len(arrays['in/loss_scale']))
      bounds = intervals.uniform(count).bounds
      out[name] = np.stack([bounds[:-1], bounds[1:]], axis=1)
  # Where a batch does not divide, theirs drops the rest; ours is refused.
  out['out/batch_per_cluster'] = [
    np.bincount(strata.slot_of(batch - batch % count, count))[0]
    for batch, count in ((256, 8), (50, 5), (10, 3))
  ]
  compute = jax.jit(functools.partial(_weighted, cfg, arrays))
  return out | compute(
    *(arrays[f'in/{k}'] for k in ('toy_params', 'loss_scale'))
  )


def _weighted(cfg, arrays, a, s):
  """Return losses and gradients of the toy's a and the log-variances s."""
  out, t = {}, jnp.asarray(arrays['in/t'])
  x0, eps = last(arrays['in/x0']), last(arrays['in/noise'])
  gamma, k = cfg['p2']
  plain = Gaussian(cfg['T'], SCHEDULE_NAMES[cfg['schedule']])
  weights = {
    'constant': noise.unit_weight,
    'min_snr': functools.partial(noise.min_snr, gamma=cfg['snr_k']),
    'p2': functools.partial(noise.p2, gamma=gamma, k=k),
  }

  def losses_of(a, process, x0, eps, t):
    x_t = process.corrupt(x0, eps, t)
    output = toy(a, x_t, process.model_time(t))
    return process.loss(output, x0, eps, x_t, t)

  for name in ('constant', 'min_snr'):
    process = dataclasses.replace(plain, weight=weights[name])
    loss, parts = losses_of(a, process, x0, eps, t)
    out |= {f'out/{name}/vb': parts['vb'], f'out/{name}/loss': loss}
    # Theirs is the weighted one.
    out[f'out/{name}/mse'] = loss - parts['vb']
    out[f'grad/{name}/toy_params'] = jax.grad(
      lambda a, process=process: losses_of(a, process, x0, eps, t)[0].mean()
    )(a)

  # The published weights [N, C, H, W] multiply the errors [N] along the width.
  t_p2 = jnp.asarray(arrays['in/p2_t'])
  n = len(t_p2)
  _, parts = losses_of(a, plain, x0[:n], eps[:n], t_p2)
  weight = weights['p2'](plain.snr(t_p2), 'eps')[:, None, None, None]
  shape = arrays['out/p2/mse'].shape
  out['out/p2/mse'] = jnp.broadcast_to(weight * parts['mse'], shape)
  out['out/p2/loss'] = jnp.broadcast_to(
    weight * parts['mse'] + parts['vb'], shape
  )
  steps = jnp.arange(cfg['T'])
  out['out/p2/weight_per_t'] = weights['p2'](plain.snr(steps), 'eps')

  total, grads = jax.value_and_grad(
    lambda s, a: _uncertain(s, losses_of(a, plain, x0, eps, t)[0]), (0, 1)
  )(s, a)
  return out | {
    'out/uw/loss': total,
    'grad/uw/loss_scale': grads[0],
    'grad/uw/toy_params': grads[1],
    'out/uw/weights': tasks.uncertainty_weights(s),
  }
