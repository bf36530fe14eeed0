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
from vfm_jax.ops.diffusion import Gaussian
from vfm_jax.ops.timesteps import LossAware

RNG = jax.random.key(7)


class Pixelwise(nn.Module):
  """Predict each pixel from itself, the time, the level and the label."""

  label_dropout: float = 0.5
  channels: int = 6
  num_classes: int = 3

  @nn.compact
  def __call__(self, x, t, y=None, *, drop=None, tau=None):
    table = self.param('labels', nn.initializers.normal(), (4, 8))
    cond = jnp.stack([t / 1000, tau / 1000.0], -1)
    h = nn.Dense(8)(x) + nn.Dense(8)(cond).reshape(-1, *(1,) * (x.ndim - 2), 8)
    if y is not None:
      y = y if drop is None else jnp.where(drop, 3, y)
      h += table[y].reshape(-1, *(1,) * (x.ndim - 2), 8)
    return nn.Dense(self.channels)(nn.silu(h))


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
  params, extra = objective.init(RNG, batch)
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
  def state_after(accum):
    tx = optax.sgd(0.1)
    state = step.init_state(OBJECTIVE, tx, 0, BATCH)
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
  extra = objective.init(RNG, BATCH)[1]
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
