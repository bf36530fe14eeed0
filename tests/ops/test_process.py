"""Check what all processes share: times of a range of noise levels."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from vfm_jax.ops import noise, paths
from vfm_jax.ops.diffusion import Gaussian
from vfm_jax.ops.interpolants import Interpolant, logit_normal, snr_index
from vfm_jax.ops.process import NOISE_LEVELS, Process, check_reachable

KEYS = jax.random.split(jax.random.key(0), 2000)
NORMAL = functools.partial(logit_normal, mean=-0.4, scale=1.3)
COSINE = functools.partial(snr_index, schedule=noise.cosine)
PROCESSES = {
  'steps': Gaussian(),
  'few steps': Gaussian(steps=300),
  'many steps': Gaussian(steps=2500),
  'uniform': Interpolant(),
  'logit-normal': Interpolant(density=NORMAL),
  'margins': Interpolant(paths.VP(), 'noise', train_eps=1e-3, density=NORMAL),
  'snr': Interpolant(index=snr_index),
  'cosine': Interpolant(paths.GVP(), index=COSINE, density=NORMAL),
}


@functools.cache
def drawing(name):
  process = PROCESSES[name]

  def draw(keys, low, high):
    t = process.draw_within(keys, low, high)
    return t, process.noise_index(t)

  return jax.jit(draw)


@pytest.mark.parametrize('name', PROCESSES)
def test_times_lie_in_the_levels(name):
  process = PROCESSES[name]
  assert isinstance(process, Process)
  rng = np.random.default_rng(0)
  low = rng.integers(0, NOISE_LEVELS - 20, len(KEYS)).astype(np.int32)
  high = low + rng.integers(12, 400, len(KEYS))
  high = np.minimum(high, NOISE_LEVELS).astype(np.int32)
  if isinstance(process, Interpolant):
    # A continuous one knows each level by itself.
    high[::2] = low[::2] + 1
    if name == 'margins':
      low, high = np.clip(low, 2, 900), np.clip(high, 14, 901)
  t, level = drawing(name)(KEYS, low, high)
  assert np.all(level >= low)
  assert np.all(level < high)
  # Outside of a compiled step as well.
  level = process.noise_index(t)
  assert np.all(level >= low)
  assert np.all(level < high)


@pytest.mark.parametrize('name', PROCESSES)
def test_all_levels_are_training_bit_for_bit(name):
  zero = jnp.zeros(len(KEYS), jnp.int32)
  with jax.disable_jit():  # a compiler may fuse the two in different ways
    t, _ = drawing(name)(KEYS, zero, zero + NOISE_LEVELS)
    expected = PROCESSES[name].draw_time(KEYS)
  assert t.dtype == expected.dtype
  np.testing.assert_array_equal(t, expected)


@pytest.mark.parametrize('name', ['steps', 'few steps', 'uniform', 'cosine'])
def test_the_density_is_that_of_training_cut(name):
  low, high = 300, 700
  full = (jnp.full(len(KEYS), x, jnp.int32) for x in (low, high))
  t, _ = drawing(name)(KEYS, *full)
  more = jax.random.split(jax.random.key(1), 6000)
  all_t = PROCESSES[name].draw_time(more)
  level = PROCESSES[name].noise_index(all_t)
  kept = np.asarray(all_t)[(level >= low) & (level < high)]
  assert stats.ks_2samp(t, kept).pvalue > 1e-3


@pytest.mark.parametrize('name', ['steps', 'logit-normal'])
def test_a_draw_is_the_keys_own(name):
  low = jnp.arange(len(KEYS), dtype=jnp.int32) % 500
  t, _ = drawing(name)(KEYS, low, low + 300)
  back, _ = drawing(name)(KEYS[::-1], low[::-1], low[::-1] + 300)
  np.testing.assert_array_equal(back[::-1], t)


def test_refuses_levels_that_no_step_has():
  bounds = (0, 100, 300, 320, 1000)
  check_reachable(Gaussian(), itertools.pairwise(bounds), 'objective.x')
  with pytest.raises(ValueError, match=r'`objective.x`.*\[\(300, 320\)\]'):
    check_reachable(
      Gaussian(steps=5), itertools.pairwise(bounds), 'objective.x'
    )
  # Also while a step is traced.
  check = lambda x: check_reachable(Interpolant(), [(0, 1)], 'x') or x  # noqa: E731
  jax.eval_shape(check, jnp.zeros(2))


def test_refuses_respaced_steps_and_densities_without_ends():
  zero, end = jnp.zeros(2, jnp.int32), jnp.full(2, 10)
  with pytest.raises(ValueError, match=r'`objective.process.respacing`'):
    Gaussian(respacing='10').draw_within(KEYS[:2], zero, end)
  bare = Interpolant(density=lambda keys: jnp.zeros(len(keys)))
  with pytest.raises(TypeError, match=r'`objective.process.density`.*within'):
    bare.draw_within(KEYS[:2], zero, end)


def test_the_cleanest_time_of_a_quarter_circle_is_clean():
  process = Interpolant(paths.GVP(), index=snr_index)
  np.testing.assert_array_equal(
    process.noise_index(jnp.array([0.0, 1.0])), [999, 0]
  )
