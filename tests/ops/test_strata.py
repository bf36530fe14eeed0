import jax
import numpy as np
import pytest
from scipy import stats

from vfm_jax import config
from vfm_jax.ops.diffusion import Gaussian
from vfm_jax.ops.interpolants import Interpolant
from vfm_jax.ops.intervals import Intervals, between, uniform
from vfm_jax.ops.strata import SoftInterval, Stratified
from vfm_jax.ops.timesteps import Times

KEYS = jax.random.split(jax.random.key(0), 1200)


@pytest.mark.parametrize('process', [Gaussian(), Interpolant()])
def test_slices_are_of_their_intervals(process):
  intervals = Intervals((0, 10, 400, 900, 1000))
  times = Stratified(intervals)
  assert isinstance(times, Times)
  t, weights = times.draw(times.init(), KEYS, process)
  of = intervals.of(process.noise_index(t))
  np.testing.assert_array_equal(of, np.repeat(np.arange(4), 300))
  np.testing.assert_array_equal(weights, 1)
  assert times.update((), t, weights) == ()


def test_one_interval_is_training():
  for process in (Gaussian(), Interpolant()):
    t, _ = Stratified(uniform(1)).draw((), KEYS, process)
    np.testing.assert_array_equal(t, process.draw_time(KEYS))


def test_refuses_a_batch_that_does_not_divide():
  with pytest.raises(
    ValueError, match=r'multiple of 5 .*`objective.times.intervals`, found 12;'
  ):
    Stratified(uniform(5)).draw((), KEYS[:12], Gaussian())
  with pytest.raises(ValueError, match='more steps'):
    Stratified(uniform(8)).draw((), KEYS[:8], Gaussian(steps=4))


@pytest.mark.parametrize(('number', 'own'), [(0, 0.8), (1, 0.4), (3, 0.1)])
def test_how_often_an_expert_sees_its_interval(number, own):
  times = SoftInterval(number, uniform(4), own)
  assert isinstance(times, Times)
  t, weights = times.draw(times.init(), KEYS, Gaussian())
  counts = np.bincount(uniform(4).of(t), minlength=4)
  share = np.full(4, (1 - own) / 4)
  share[number] += own
  assert stats.chisquare(counts, share * len(KEYS)).pvalue > 1e-3
  np.testing.assert_array_equal(weights, 1)


def test_coins_that_always_fall_alike():
  t, _ = SoftInterval(2, between([100, 120])).draw((), KEYS, Interpolant())
  assert np.all(Interpolant().noise_index(t) >= 120)
  t, _ = SoftInterval(2, own=0.0).draw((), KEYS, Interpolant())
  np.testing.assert_array_equal(t, Interpolant().draw_time(KEYS))


def test_an_example_has_its_own_coin():
  times = SoftInterval(0, own=0.5)
  t, _ = times.draw((), KEYS, Gaussian())
  back, _ = times.draw((), KEYS[::-1], Gaussian())
  np.testing.assert_array_equal(back[::-1], t)


def test_recipes_and_refusals():
  node = config.ref(
    SoftInterval, interval=1, intervals=config.ref(uniform, count=6)
  )
  assert config.build(node).intervals.count == 6
  with pytest.raises(ValueError, match=r'from 0 to 3, .* found 4'):
    SoftInterval(4)
  with pytest.raises(ValueError, match=r'`own`.*found 1.5'):
    SoftInterval(0, own=1.5)
