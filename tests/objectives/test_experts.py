"""Check that experts learn apart and are drawn from as one."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vfm_jax import config, samplers, solvers, step
from vfm_jax.models.unet import UNet
from vfm_jax.objectives import base, frozen
from vfm_jax.objectives.denoise import Denoise
from vfm_jax.objectives.experts import Experts
from vfm_jax.ops import intervals, noise
from vfm_jax.ops.diffusion import Gaussian
from vfm_jax.ops.interpolants import Interpolant
from vfm_jax.ops.runge_kutta import Fixed
from vfm_jax.ops.strata import SoftInterval
from vfm_jax.sampling import Sampling

RNG = jax.random.key(7)
VISITED = []


class Pixelwise(nn.Module):
  """Predict each pixel from itself, the time and the label."""

  width: int = 4
  number: int | None = None
  channels: int = 3
  out_channels: int = 3
  num_classes: int = 3
  label_dropout: float = 0.5
  null_label: int | None = 3

  @nn.compact
  def __call__(self, x, t, y=None, *, drop=None, tau=None, keys=None):
    table = self.param('labels', nn.initializers.normal(), (4, self.width))
    time = nn.Dense(self.width, name='time')(t[:, None] / 1000)
    y = jnp.full(len(x), 3) if y is None else y
    y = y if drop is None else jnp.where(drop, 3, y)
    h = nn.Dense(self.width, name='in')(x) + (time + table[y])[:, None, None]
    if self.number is not None:
      jax.debug.callback(
        lambda t: VISITED.append((int(t), self.number)), tau[0]
      )
    return nn.Dense(self.out_channels, name='out')(nn.silu(h))


def expert(i, count=2, own=1.0, **kwargs):
  fields = dict(process=Gaussian(variance='small'), label='label')
  return Denoise(
    kwargs.pop('denoiser', Pixelwise(4 + i)),
    times=SoftInterval(i, intervals.uniform(count), own),
    **{**fields, **kwargs},
  )


def batch_of(size=8):
  rng = np.random.default_rng(0)
  return {
    'image': rng.integers(0, 256, (size, 4, 4, 3), np.uint8),
    'labels': {'label': rng.integers(0, 3, size).astype(np.int32)},
    'row': np.arange(size, dtype=np.int32),
  }


BATCH = batch_of()
TWO = Experts((expert(0), expert(1)))
NAMES = ('expert_0', 'expert_1')


@pytest.fixture(scope='module')
def state():
  return jax.jit(TWO.init)(jax.random.key(0), BATCH)


def test_satisfies_the_protocols():
  for protocol in (
    base.Objective,
    base.Denoises,
    base.Samples,
    base.Visualises,
    base.Checks,
    frozen.Frozen,
  ):
    assert isinstance(TWO, protocol)


def test_equals_separate_models_bit_for_bit(state):
  """Losses, gradients, metrics; and none touches another's parameters.

  Each operation is run by itself: what a compiler makes of several depends on
  the others that it sees, in the last bit.
  """
  params, extra = state

  def mean(objective, extra, batch, params):
    out = objective.loss(params, extra, batch, RNG, train=True)
    return out.sums / out.counts, out

  def graded(objective, extra, batch, params):
    run = functools.partial(mean, objective, extra, batch)
    losses, pull, out = jax.vjp(run, params, has_aux=True)
    return losses, [pull(which)[0] for which in jnp.eye(len(losses))], out

  losses, grads, out = graded(TWO, extra, BATCH, params)
  assert out.sums.shape == (2,)
  np.testing.assert_array_equal(out.counts, [4, 4])
  for i, name in enumerate(NAMES):
    part = jax.tree.map(lambda x, i=i: x[i::2], BATCH)
    (loss,), (gradient,), alone = graded(
      TWO.experts[i], extra[name], part, params[name]
    )
    assert losses[i] == loss
    jax.tree.map(np.testing.assert_array_equal, grads[i][name], gradient)
    other = grads[i][NAMES[1 - i]]
    assert not any(np.any(g) for g in jax.tree.leaves(other))
    for key, value in alone.metrics.items():
      np.testing.assert_array_equal(out.metrics[f'{name}/{key}'], value)
    # Hard intervals: all losses are in its half of the bins.
    bins = [out.metrics[f'{name}/loss_bin{j}'] for j in range(4)]
    assert not any(bins[2 - 2 * i : 4 - 2 * i])
    assert sum(bins) > 0


@pytest.mark.slow
def test_a_step_and_accumulation():
  tx = optax.sgd(0.1)
  state = jax.jit(lambda: step.init_state(TWO, tx, 0, BATCH))()
  # Parts of four: rows 0, 2, 4, 6, of which 0 and 4 are the first expert's.
  new, metrics = jax.jit(step.make_train_step(TWO, tx, accum=2))(state, BATCH)
  assert set(new.extra) == set(NAMES)
  total = metrics['loss_task0'] + metrics['loss_task1']
  np.testing.assert_allclose(metrics['loss'], total, rtol=1e-6)
  for name in NAMES:
    moved = jax.tree.map(
      lambda a, b: np.any(a != b), new.params[name], state.params[name]
    )
    assert all(jax.tree.leaves(moved))


def test_each_example_is_denoised_by_its_expert(state):
  params, _ = state
  x = np.random.default_rng(1).normal(size=(4, 4, 4, 3)).astype(np.float32)
  y = np.array([0, 1, 2, 0])
  denoise = jax.jit(TWO.denoise)
  single = [
    jax.jit(e.denoise)(params[n], x, t, y)
    for e, n in zip(TWO.experts, NAMES, strict=True)
    for t in [np.array([0, 499, 500, 999])]
  ]
  got = denoise(params, x, np.array([0, 499, 500, 999]), y)
  want = np.concatenate([single[0][:2], single[1][2:]])
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_one_expert_runs_where_all_levels_are_equal(state):
  """There is a branch for each expert, and no selection."""
  params, _ = state
  counted = Experts(
    tuple(
      expert(i, denoiser=Pixelwise(4 + i, number=i), sampling=DDIM)
      for i in range(2)
    )
  )
  text = jax.jit(TWO.denoise).lower(
    params, np.zeros((4, 4, 4, 3), np.float32), np.zeros(4, np.int32)
  )
  assert text.compile().as_text().count(' conditional(') == 2
  VISITED.clear()
  keys = jax.random.split(RNG, 2)
  draw = jax.jit(counted.draw, static_argnums=2)
  out = draw(params, keys, (4, 4, 3), np.array([0, 1]))
  jax.effects_barrier()
  assert out.shape == (2, 4, 4, 3)
  levels = [t for t, _ in VISITED]
  # As many calls as steps, guidance included, and the expert of each level.
  assert sorted(levels) == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
  assert all(number == t * 2 // 1000 for t, number in VISITED)


DDIM = Sampling(sampler=functools.partial(samplers.ddim, steps='10'), scale=2.0)


def test_experts_cover_the_levels():
  four = intervals.uniform(4)
  levels = np.arange(1000)
  np.testing.assert_array_equal(four.of(levels), levels * 4 // 1000)


def flow():
  sampling = Sampling(sampler=solvers.ode)
  return Experts(
    tuple(expert(i, process=Interpolant(), sampling=sampling) for i in range(2))
  )


@pytest.mark.slow
def test_adaptive_solvers(state):
  """Samples of one batch may stand at times of different experts."""
  params, _ = state
  keys = jax.random.split(RNG, 3)
  draw = jax.jit(flow().draw, static_argnums=2)
  out = draw(params, keys, (4, 4, 3), np.array([0, 1, 2]))
  assert np.isfinite(out).all()
  # Each is what it would be in other company.
  again = draw(params, keys[jnp.array([1, 1, 1])], (4, 4, 3), np.full(3, 1))
  np.testing.assert_allclose(again[0], out[1], atol=1e-4)


@pytest.mark.slow
def test_likelihood(state):
  params, _ = state
  x = np.random.default_rng(1).normal(size=(2, 4, 4, 3)).astype(np.float32)

  @jax.jit
  def likely(x):
    return solvers.log_likelihood(
      lambda x, t: flow().denoise(params, x, t),
      Interpolant(),
      x,
      jax.random.split(RNG, 2),
      solver=Fixed('euler'),
      num_steps=3,
    ).logp

  assert np.isfinite(likely(x)).all()


def test_evaluation_scores_each_expert_on_its_own_interval(state):
  params, extra = state
  batch = {**batch_of(12), 'valid': np.arange(12) < 9}
  out = jax.jit(lambda p: TWO.loss(p, extra, batch, RNG, train=False))(params)
  assert out.sums.shape == (2,)
  assert out.counts.sum() == 9
  assert jax.tree.structure(out.extra) == jax.tree.structure(extra)
  bins = [out.metrics[f'loss_bin{j}'] for j in range(4)]
  np.testing.assert_allclose(sum(bins[:2]), out.sums[0] / 9, rtol=1e-5)
  np.testing.assert_allclose(sum(bins[2:]), out.sums[1] / 9, rtol=1e-5)


@dataclasses.dataclass(frozen=True)
class Remember:
  """Draw as in training, and remember the loss of the last step."""

  def init(self):
    return jnp.zeros(())

  def draw(self, state, keys, process):
    return process.draw_time(keys), jnp.ones(len(keys))

  def update(self, state, t, losses):
    return state

  def pace(self, state, loss):
    return loss


def test_each_expert_is_paced_by_its_own_loss():
  paced = Experts(
    tuple(dataclasses.replace(e, times=Remember()) for e in TWO.experts)
  )
  extra = {name: {'times': jnp.zeros(())} for name in NAMES}
  metrics = {f'expert_{i}/denoising': jnp.float32(i + 3.0) for i in range(2)}
  new = paced.after_update(extra, dict.fromkeys(NAMES), 0, metrics)
  assert [new[name]['times'] for name in NAMES] == [3.0, 4.0]


@dataclasses.dataclass(frozen=True)
class Bright:
  """Decode to pictures of three colours with a weight."""

  def weights(self) -> Any:
    return {'gain': np.float32(2.0)}

  def decode(self, weights, z):
    return weights['gain'] * z


def test_pictures(state):
  params, _ = state
  seen = Experts(
    tuple(expert(i, sampling=DDIM, decoder=Bright()) for i in range(2))
  )
  assert seen.data == 'image'
  assert seen.check_labels(None) == [0, 1, 2]
  full = frozen.with_frozen(seen, params)
  out = jax.jit(seen.visualise)(full, {}, batch_of(2), RNG)
  assert set(out) == {'data', 'sample'}
  assert out['sample'].shape == (2, 1, 4, 4, 3)
  assert out['sample'].dtype == jnp.uint8


def test_errors(state):
  params, extra = state
  with pytest.raises(ValueError, match=r'objective\.experts. for each of 3'):
    Experts(TWO.experts, intervals.uniform(3))
  with pytest.raises(ValueError, match='found 0'):
    Experts(())
  other = expert(1, process=Gaussian(schedule=noise.cosine, variance='small'))
  with pytest.raises(ValueError, match=r'experts\.1. to agree.*process'):
    Experts((expert(0), other))
  wide = expert(1, denoiser=Pixelwise(out_channels=6))
  with pytest.raises(ValueError, match=r'\(3, 6\) and \(3, 3\) channels'):
    Experts((expert(0), wide))
  for denoiser in (Pixelwise(num_classes=4), Pixelwise(null_label=None)):
    other = expert(1, denoiser=denoiser)
    with pytest.raises(ValueError, match=r'experts\.1\.denoiser. .*labels'):
      Experts((expert(0), other))
    Experts((expert(0, label=None), dataclasses.replace(other, label=None)))
  with pytest.raises(ValueError, match=r'experts\.0\.times. .* interval 1'):
    Experts((expert(1), expert(0)))
  with pytest.raises(ValueError, match=r'objective\.experts.*batch_size'):
    TWO.loss(params, extra, batch_of(7), RNG, train=True)
  batch = {**batch_of(2), 'index': np.arange(2)}
  batch['labels'] = {'label': np.array([0, 5])}
  with pytest.raises(ValueError, match='num_classes'):
    TWO.check(batch)


def test_a_recipe_can_name_them():
  times = [config.ref(SoftInterval, interval=i) for i in range(4)]
  shared = dict(process=config.ref(Gaussian, variance='small'), label=None)
  node = config.ref(
    Experts,
    experts=tuple(
      config.ref(Denoise, denoiser=config.ref(UNet), times=t, **shared)
      for t in times
    ),
  )
  built = config.build(node)
  assert built.ranges.count == 4
  assert built.experts[2].times.interval == 2
