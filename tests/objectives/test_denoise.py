import dataclasses
import functools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vfm_jax import config, step
from vfm_jax.models.dit import DiT
from vfm_jax.objectives import base
from vfm_jax.objectives.denoise import Denoise
from vfm_jax.ops import noise
from vfm_jax.ops.curriculum import Curriculum
from vfm_jax.ops.diffusion import Gaussian
from vfm_jax.ops.interpolants import Interpolant
from vfm_jax.ops.intervals import Intervals, uniform
from vfm_jax.ops.keys import fold
from vfm_jax.ops.strata import Stratified
from vfm_jax.ops.timesteps import LossAware

RNG = jax.random.key(7)


class Pixelwise(nn.Module):
  """Predict each pixel from itself, the time, the level and the label."""

  label_dropout: float = 0.5
  channels: int = 3
  out: int = 6
  num_classes: int = 3

  @nn.compact
  def __call__(self, x, t, y=None, *, drop=None, tau=None, keys=None):
    table = self.param('labels', nn.initializers.normal(), (4, 8))
    cond = jnp.stack([t / 1000, tau / 1000.0], -1)
    h = nn.Dense(8)(x) + nn.Dense(8)(cond).reshape(-1, *(1,) * (x.ndim - 2), 8)
    if y is not None:
      y = y if drop is None else jnp.where(drop, 3, y)
      h += table[y].reshape(-1, *(1,) * (x.ndim - 2), 8)
    return nn.Dense(self.out)(nn.silu(h))


def batch_of(size=8):
  rng = np.random.default_rng(0)
  return {
    'image': rng.integers(0, 256, (size, 4, 4, 3), np.uint8),
    'labels': {'label': rng.integers(0, 3, size).astype(np.int32)},
    'row': np.arange(size, dtype=np.int32),
  }


BATCH = batch_of()
OBJECTIVE = Denoise(Pixelwise())


@pytest.fixture(scope='module')
def params():
  return jax.jit(OBJECTIVE.init)(jax.random.key(0), BATCH)[0]


@functools.cache
def compiled(objective, train):
  return jax.jit(partial(objective.loss, train=train))


def loss_of(params, objective=OBJECTIVE, batch=BATCH, train=True, extra=None):
  return compiled(objective, train)(params, extra or {}, batch, RNG)


def test_satisfies_the_protocols():
  assert isinstance(OBJECTIVE, base.Objective)
  assert isinstance(OBJECTIVE, base.Denoises)


def test_a_recipe_can_name_it():
  node = config.ref(
    Denoise,
    denoiser=config.ref(DiT, width=8, depth=1, heads=1, input_size=8),
    process=config.ref(Gaussian, schedule=noise.cosine),
    times=config.ref(LossAware),
  )
  built = config.build(node)
  assert built.process.schedule(10)[-1] == noise.cosine(10)[-1]
  assert built.denoiser.width == 8


def test_sums_and_parts(params):
  out = loss_of(params)
  assert out.sums.shape == out.counts.shape == (1,)
  assert out.counts[0] == 8
  m = out.metrics
  mean = out.sums[0] / 8
  np.testing.assert_allclose(mean, m['mse'] + m['vb'], rtol=1e-5)
  bins = sum(m[f'loss_bin{i}'] for i in range(4))
  np.testing.assert_allclose(mean, bins, rtol=1e-5)


def test_an_example_is_scored_alike_in_any_batch(params):
  whole = loss_of(params)
  parts = [
    loss_of(params, batch=jax.tree.map(lambda x, i=i: x[i::2], BATCH))
    for i in range(2)
  ]
  total = sum(p.sums for p in parts)
  np.testing.assert_allclose(total, whole.sums, rtol=1e-5)


def test_pixels_are_scaled_and_latents_are_not(params):
  latents = {**BATCH, 'image': BATCH['image'] / np.float32(127.5) - 1}
  np.testing.assert_allclose(
    loss_of(params, batch=latents).sums, loss_of(params).sums, rtol=1e-6
  )


def test_labels_are_dropped_in_training_alone(params):
  def sums(rate, train):
    objective = Denoise(Pixelwise(label_dropout=rate))
    return loss_of(params, objective, train=train).sums

  plain = sums(0.0, True)
  assert sums(0.5, True) != plain
  assert sums(0.5, False) == plain
  nulls = {**BATCH, 'labels': {'label': np.full(8, 3, np.int32)}}
  np.testing.assert_allclose(
    sums(1.0, True), loss_of(params, batch=nulls).sums, rtol=1e-6
  )


def test_learns_without_labels():
  objective = Denoise(Pixelwise(), label=None, data='video')
  video = np.zeros((2, 3, 4, 4, 3), np.uint8)
  batch = {'video': video, 'row': np.arange(2, dtype=np.int32)}
  params, extra = jax.jit(objective.init)(RNG, batch)
  assert extra == {}
  assert np.isfinite(loss_of(params, objective, batch).sums).all()


def test_padding_of_an_evaluation_counts_for_nothing(params):
  padded = jax.tree.map(lambda x: np.concatenate([x, x[:2]]), BATCH)
  padded['row'] = np.arange(10, dtype=np.int32)
  padded['valid'] = np.arange(10) < 8
  out = loss_of(params, batch=padded, train=False)
  plain = loss_of(params, train=False)
  np.testing.assert_allclose(out.sums, plain.sums, rtol=1e-5)
  np.testing.assert_allclose(out.metrics['vb'], plain.metrics['vb'], rtol=1e-5)
  assert out.counts == plain.counts


def test_accumulation_changes_nothing():
  tx = optax.sgd(0.1)
  state = jax.jit(lambda: step.init_state(OBJECTIVE, tx, 0, BATCH))()

  def state_after(accum):
    make = step.make_train_step(OBJECTIVE, tx, accum=accum)
    return jax.jit(make)(state, BATCH)

  (one, m1), (two, m2) = state_after(1), state_after(2)
  np.testing.assert_allclose(m1['loss'], m2['loss'], rtol=1e-5)
  np.testing.assert_allclose(m1['loss_bin2'], m2['loss_bin2'], rtol=1e-5)
  jax.tree.map(
    partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
    one.params,
    two.params,
  )


def test_drawn_times_can_follow_the_losses(params):
  process = Gaussian(steps=4, schedule=noise.cosine)
  times = LossAware(4, keep=1, uniform=0.5)
  objective = Denoise(Pixelwise(), process, times=times)
  extra = jax.jit(objective.init)(RNG, BATCH)[1]
  out = loss_of(params, objective, extra=extra)
  seen = out.extra['times']
  assert seen.counts.sum() > 1
  # Uniform so far, so the weights are 1: what is remembered are the losses.
  uniform = loss_of(params, dataclasses.replace(objective, times=None))
  assert uniform.extra == {}
  full = {'times': seen._replace(counts=jnp.ones(4, jnp.int32))}
  again = loss_of(params, objective, extra=full)
  assert again.sums != out.sums
  kept = loss_of(params, objective, extra=full, train=False).extra
  jax.tree.map(np.testing.assert_array_equal, kept, full)


def test_denoise_gives_the_network_its_time_and_level(params):
  x = jnp.ones((2, 4, 4, 3))
  t = jnp.array([3, 900])
  out = OBJECTIVE.denoise(params, x, t, jnp.array([0, 3]))
  same = Pixelwise().apply(
    {'params': params['denoiser']}, x, t.astype(jnp.float32), jnp.array([0, 3]),
    tau=t,
  )  # fmt: skip
  np.testing.assert_array_equal(out, same)
  assert not np.allclose(out[0], out[1])


def test_errors_name_what_to_change(params):
  batch = {k: v for k, v in BATCH.items() if k != 'image'}
  with pytest.raises(ValueError, match=r'objective\.data'):
    loss_of(params, batch=batch)
  with pytest.raises(
    ValueError, match=r"'class', found \['label'\].*objective"
  ):
    loss_of(params, Denoise(Pixelwise(), label='class'))
  with pytest.raises(ValueError, match=r'process\.variance'):
    loss_of(params, Denoise(Pixelwise(), Gaussian(variance='small')))


def test_times_that_do_not_go_with_the_rest_are_refused():
  make = partial(Denoise, Pixelwise())
  for process in (Interpolant(), Gaussian(steps=500)):
    with pytest.raises(ValueError, match=r'objective\.process.*1000, found'):
      make(process, times=LossAware())
  with pytest.raises(ValueError, match=r'objective\.tasks. None, found 4'):
    make(times=LossAware(), tasks=uniform(4))
  for times in (Stratified(uniform(5)), Curriculum(strata=uniform(5))):
    with pytest.raises(ValueError, match=r'objective\.tasks.*times\.\w+'):
      make(times=times, tasks=uniform(4))
    # Parts of the intervals, or several of them, are tasks as well.
    for tasks in (None, uniform(5), uniform(10), Intervals((0, 400, 1000))):
      make(times=times, tasks=tasks)
  make(times=Curriculum(uniform(20)), tasks=uniform(3))


def test_labels_that_have_no_row_are_refused():
  objective = Denoise(Pixelwise())
  labels = np.arange(3, dtype=np.int32)
  batch = {'labels': {'label': labels}, 'index': 10 + labels}
  objective.check(batch)
  batch['labels'] = {'label': labels + objective.denoiser.num_classes - 1}
  with pytest.raises(
    ValueError, match=r'num_classes`\), found \[\d+, \d+\] .* \[11, 12\]'
  ):
    objective.check(batch)


def test_intervals_are_tasks(params):
  # The last one is so short that no example is in it.
  tasks = Intervals((0, 250, 500, 750, 999, 1000))
  out = loss_of(params, Denoise(Pixelwise(), tasks=tasks))
  plain = loss_of(params)
  keys = fold(base.example_keys(RNG, BATCH), 0)
  level = OBJECTIVE.process.noise_index(OBJECTIVE.process.draw_time(keys))
  counts = np.histogram(level, tasks.bounds)[0]
  np.testing.assert_array_equal(out.counts, counts)
  assert counts[4] == out.sums[4] == 0
  for k in range(4):
    np.testing.assert_allclose(
      out.sums[k] / 8, plain.metrics[f'loss_bin{k}'], rtol=1e-5
    )
  np.testing.assert_allclose(
    out.metrics['denoising'], plain.sums[0] / 8, rtol=1e-6
  )


class Telling(Pixelwise):
  """Sow what random keys say, and how much of the input is above zero."""

  @nn.compact
  def __call__(self, x, t, y=None, *, drop=None, tau=None, keys=None):
    self.sow('aux', 'above', (x > 0).mean((1, 2, 3)))
    if keys is not None:
      self.sow('aux', 'random', jax.vmap(jax.random.uniform)(keys))
    return super().__call__(x, t, y, drop=drop, tau=tau)


@dataclasses.dataclass(frozen=True)
class Mean:
  """Score the mean of a value."""

  name: str = 'above'

  def __call__(self, values, tau, valid):
    value = values[self.name]
    assert value.shape == (1, *tau.shape)
    return 3 * (value[0] * valid).sum() / valid.sum(), {'told': value.mean()}


def test_what_hooks_sow_is_scored_beside_the_loss(params):
  objective = Denoise(Telling(), auxiliary=Mean())
  out = loss_of(params, objective)
  plain = loss_of(params)
  np.testing.assert_array_equal(out.sums, plain.sums)
  np.testing.assert_allclose(out.aux, 3 * out.metrics['told'], rtol=1e-6)
  assert 0 < out.aux < 3
  assert plain.aux == 0
  with pytest.raises(ValueError, match=r"auxiliary.*'gates'.*\['above'"):
    loss_of(params, Denoise(Telling(), auxiliary=Mean('gates')))


def test_hooks_have_keys_of_their_own_in_training_alone(params):
  objective = Denoise(Telling(), auxiliary=Mean('random'))
  keys = fold(base.example_keys(RNG, BATCH), 3)
  random = jax.vmap(jax.random.uniform)(keys)
  out = loss_of(params, objective)
  np.testing.assert_allclose(out.metrics['told'], random.mean(), rtol=1e-6)
  with pytest.raises(ValueError, match=r"'random'.*\['above'\]"):
    loss_of(params, objective, train=False)


@dataclasses.dataclass(frozen=True)
class Diary:
  """Draw as the process does, and note the losses of steps."""

  def init(self):
    return {'last': jnp.zeros(()), 'calls': jnp.zeros(())}

  def draw(self, state, keys, process):
    return process.draw_time(keys), jnp.ones(len(keys))

  def update(self, state, t, losses):
    return state

  def pace(self, state, loss):
    return {'last': loss, 'calls': state['calls'] + 1}


def test_times_are_told_the_mean_loss_of_each_step():
  objective = Denoise(
    Telling(out=3),
    Gaussian(variance='small'),
    times=Diary(),
    tasks=Intervals((0, 300, 1000)),
    auxiliary=Mean(),
  )
  tx = optax.sgd(0.0)
  state = jax.jit(lambda: step.init_state(objective, tx, 0, BATCH))()
  make = step.make_train_step(objective, tx, accum=2)
  one, metrics = jax.jit(make)(state, BATCH)
  noted = one.extra['times']
  assert noted['calls'] == 1
  np.testing.assert_allclose(noted['last'], metrics['denoising'], rtol=1e-6)
  bins = sum(metrics[f'loss_bin{i}'] for i in range(4))
  np.testing.assert_allclose(noted['last'], bins, rtol=1e-5)
  assert metrics['loss'] > metrics['denoising'] + metrics['told']
