import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from vfm_jax import config
from vfm_jax.ops import clustering
from vfm_jax.ops.curriculum import Curriculum
from vfm_jax.ops.diffusion import Gaussian
from vfm_jax.ops.interpolants import Interpolant
from vfm_jax.ops.intervals import Intervals, uniform
from vfm_jax.ops.strata import Stratified
from vfm_jax.ops.timesteps import Paced, Reports, Times

KEYS = jax.random.split(jax.random.key(0), 1000)


def at(times, number):
  return times.init()._replace(number=jnp.asarray(number, jnp.int32))


@functools.cache
def pacing(times):
  """Return the stages after each of some losses, and the last state."""

  def body(state, loss):
    state = times.pace(state, loss)
    return state, state.number

  return jax.jit(lambda state, losses: jax.lax.scan(body, state, losses))


def stages(times, losses, state=None):
  state = times.init() if state is None else state
  state, numbers = pacing(times)(state, jnp.asarray(losses, jnp.float32))
  return state, np.asarray(numbers)


def test_satisfies_the_protocols():
  times = Curriculum()
  assert isinstance(times, Times)
  assert isinstance(times, Paced)
  assert isinstance(times, Reports)
  assert times.report(times.init())['curriculum_stage'] == 1
  assert times.update(times.init(), None, None).number == 1


def test_stages_are_nested_and_uniform():
  times = Curriculum(uniform(4))
  draw = jax.jit(lambda s, k: times.draw(s, k, Gaussian())[0])
  for number in range(1, 5):
    t = np.asarray(draw(at(times, number), KEYS))
    first = 1000 - number * 250
    assert t.min() >= first
    counts = np.bincount((t - first) * 8 // (number * 250), minlength=8)
    assert stats.chisquare(counts).pvalue > 1e-3
  np.testing.assert_array_equal(t, Gaussian().draw_time(KEYS))
  # One program for all stages.
  assert draw._cache_size() == 1


def test_other_orders():
  back = Curriculum(uniform(4), order='hard_to_easy')
  t, weights = back.draw(at(back, 1), KEYS, Gaussian())
  assert t.max() < 250
  np.testing.assert_array_equal(weights, 1)
  none = Curriculum(uniform(4), order='none')
  for process in (Gaussian(), Interpolant()):
    t, _ = none.draw(none.init(), KEYS, process)
    np.testing.assert_array_equal(t, process.draw_time(KEYS))
  assert stages(none, np.ones(1000))[1].max() == 4


def test_continuous_time():
  # Time runs from noise to data: stage n of N is all up to about n / N.
  times = Curriculum(uniform(5))
  t, _ = times.draw(at(times, 2), KEYS, Interpolant())
  assert 0.39 < t.max() <= 0.401
  assert t.min() < 0.01
  t, _ = times.draw(at(times, 5), KEYS, Interpolant())
  np.testing.assert_array_equal(t, Interpolant().draw_time(KEYS))


def test_a_loss_that_falls_never_ends_a_stage():
  times = Curriculum(uniform(3), patience=4)
  state, numbers = stages(times, np.linspace(1, 0, 50))
  assert numbers.max() == 1
  assert state.best == 0
  assert state.counter == 0


def test_a_constant_loss_ends_a_stage_after_its_patience():
  # The first step sets the best loss, then one more than `patience` do not.
  times = Curriculum(uniform(4), patience=5)
  _, numbers = stages(times, np.ones(100))
  changes = np.flatnonzero(np.diff(np.append(1, numbers))) + 1
  np.testing.assert_array_equal(changes, [7, 14, 21])
  assert numbers[-1] == 4


def test_a_new_stage_starts_afresh():
  times = Curriculum(uniform(3), patience=2, smoothing=0.9)
  state, numbers = stages(times, np.ones(4))
  assert numbers.tolist() == [1, 1, 1, 2]
  assert state.best == jnp.inf
  assert state.counter == 0
  assert jnp.isnan(state.smoothed)
  # A larger loss than that of the stage before is the best of this one.
  state, _ = stages(times, [5.0], state)
  assert state.best == 5
  assert state.smoothed == 5


def test_smoothing_and_least_improvement():
  times = Curriculum(smoothing=0.75)
  state, _ = stages(times, [4.0, 0.0])
  assert state.smoothed == 3
  assert state.best == 3
  state, _ = stages(Curriculum(min_delta=0.5), [4.0, 3.6])
  assert state.best == 4
  assert state.counter == 1


def test_what_is_no_number_is_no_improvement():
  times = Curriculum(uniform(2), patience=2, smoothing=0.5)
  state, numbers = stages(times, [1.0, np.nan, np.nan])
  assert (state.best, state.counter, state.smoothed) == (1, 2, 1)
  state, numbers = stages(times, [np.nan], state)
  assert numbers[-1] == 2
  state, _ = stages(times, [np.nan, -np.inf])
  assert state.best == jnp.inf


def test_a_run_goes_on_where_it_stopped():
  times = Curriculum(uniform(5), patience=3, smoothing=0.3)
  losses = np.random.default_rng(0).random(60)
  straight, numbers = stages(times, losses)
  half, first = stages(times, losses[:23])
  half = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), half)
  rest, second = stages(times, losses[23:], half)
  np.testing.assert_array_equal(numbers, np.append(first, second))
  jax.tree.map(np.testing.assert_array_equal, straight, rest)
  assert np.all(np.diff(numbers) >= 0)


def test_stages_of_a_fixed_length():
  times = Curriculum(uniform(3), stage_steps=10)
  _, numbers = stages(times, np.linspace(1, 0, 40))
  # Ten steps are drawn in each stage.
  np.testing.assert_array_equal(np.flatnonzero(np.diff(numbers)), [8, 18])
  assert numbers[-1] == 3


def test_strata_share_the_slices_of_those_without_levels():
  strata = Intervals((0, 100, 450, 800, 1000))
  times = Curriculum(uniform(10), strata=strata)
  draw = jax.jit(lambda s, k: times.draw(s, k, Gaussian())[0])
  expected = {1: [3], 2: [3], 3: [2, 3], 6: [1, 2, 3], 10: [0, 1, 2, 3]}
  for number, active in expected.items():
    t = np.asarray(draw(at(times, number), KEYS))
    assert t.min() >= 1000 - 100 * number
    of = np.asarray(strata.of(t))
    assert np.all(np.diff(of) >= 0)
    counts = np.bincount(of, minlength=4)
    assert np.flatnonzero(counts).tolist() == active
    assert np.ptp(counts[active]) <= 1
  assert draw._cache_size() == 1
  plain, _ = Stratified(strata).draw((), KEYS, Gaussian())
  np.testing.assert_array_equal(t, plain)
  with pytest.raises(ValueError, match=r'`objective.times.strata`, found 10'):
    times.draw(times.init(), KEYS[:10], Gaussian())


def test_clusters_by_snr():
  found = clustering.by_log_snr(20)
  times = Curriculum(found)
  low, high = times.support(times.init())
  assert (low, high) == (found.bounds[-2], 1000)


def test_recipes_and_refusals():
  node = config.ref(Curriculum, strata=config.ref(uniform, count=4))
  assert config.build(node).strata == uniform(4)
  with pytest.raises(ValueError, match=r"`objective.times.order`.*'random'"):
    Curriculum(order='random')
  with pytest.raises(ValueError, match=r'`objective.times.smoothing`.*1.0'):
    Curriculum(smoothing=1.0)
  with pytest.raises(ValueError, match=r'`objective.times.patience`.*-1'):
    Curriculum(patience=-1)
  with pytest.raises(ValueError, match=r'`objective.times.stage_steps`.*0'):
    Curriculum(stage_steps=0)
  with pytest.raises(ValueError, match=r'`objective.times.clusters`'):
    Curriculum().draw(Curriculum().init(), KEYS[:4], Gaussian(steps=5))
