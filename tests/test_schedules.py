"""Check the schedules against closed forms and recorded tables."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax import schedules

S = 40
EVERY = {
  'constant': functools.partial(schedules.constant, value=0.3),
  'linear': functools.partial(schedules.linear, peak=1.0, warmup_steps=7),
  'cosine': functools.partial(
    schedules.warmup_cosine, peak=1.0, final=0.1, warmup_fraction=0.2
  ),
  'rsqrt': functools.partial(
    schedules.rsqrt, peak=1.0, warmup_steps=5, timescale=5, cooldown_steps=10
  ),
  'wsd': functools.partial(
    schedules.warmup_stable_decay, peak=1.0, warmup_steps=5, decay_steps=10
  ),
}


@pytest.mark.parametrize('name', EVERY)
def test_python_numpy_and_traced_steps_agree(name):
  f = EVERY[name]
  steps = np.arange(S + 3)
  table = f(steps, S)
  assert table.dtype == np.float64
  one_by_one = np.array([f(int(s), S) for s in steps])
  np.testing.assert_array_equal(one_by_one, table)
  traced = jax.jit(jax.vmap(lambda s: f(s, S)))(jnp.asarray(steps))
  assert traced.dtype == jnp.float32
  np.testing.assert_allclose(traced, table, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('name', EVERY)
def test_no_step_is_negative_or_above_the_peak(name):
  table = EVERY[name](np.arange(S), S)
  assert (table >= 0).all()
  assert table.max() <= 1.0


def test_ramps():
  assert schedules.open_ramp(0, 4) == 0
  assert schedules.open_ramp(4, 4) == 1
  assert schedules.closed_ramp(3, 4) == 1
  assert schedules.closed_ramp(0, 1) == 0
  assert schedules.early_ramp(0, 4) == 0.25


def test_cosine_with_closed_ramp_is_the_table_of_videomae():
  base, final, n, w = 1.5e-4, 1e-5, 70, 21
  expected = np.concatenate(
    [
      np.linspace(0, base, w),
      [
        final + 0.5 * (base - final) * (1 + math.cos(math.pi * i / (n - w)))
        for i in range(n - w)
      ],
    ]
  )
  got = schedules.warmup_cosine(
    np.arange(n),
    n,
    peak=base,
    final=final,
    warmup_steps=w,
    ramp=schedules.closed_ramp,
  )
  np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-18)
  assert got[w - 1] == got[w] == base  # the peak comes twice


def test_wsd_holds_and_ends():
  f = EVERY['wsd']
  assert f(5, S) == f(29, S) == 1.0
  assert f(35, S) == 0.5
  assert f(S, S) == 0.0


def test_rsqrt_halves_after_three_timescales():
  f = functools.partial(schedules.rsqrt, peak=1.0, timescale=10)
  assert f(30, 1000) == 0.5


def test_warmup_is_given_once_and_fits():
  f = functools.partial(schedules.linear, 0, 10, peak=1.0)
  with pytest.raises(ValueError, match='not both'):
    f(warmup_steps=2, warmup_fraction=0.2)
  with pytest.raises(ValueError, match='11 steps does not fit into 10'):
    f(warmup_steps=11)


def test_a_schedule_may_outlast_the_run_and_be_ahead_of_it():
  """The rates of V-JEPA: 90,000 of 112,500 steps."""
  cosine = functools.partial(
    schedules.warmup_cosine,
    peak=6.25e-4,
    final=1e-6,
    start=2e-4,
    warmup_steps=12_000,
  )
  got = schedules.stretched(
    np.array([0, 5_999, 11_999, 49_999, 89_999]),
    90_000,
    schedule=cosine,
    scale=1.25,
    ahead=1,
  )
  want = [2.000354e-4, 4.125e-4, 6.25e-4, 4.29576e-4, 7.50422e-5]
  np.testing.assert_allclose(got, want, rtol=1e-6)
  decay = functools.partial(schedules.warmup_cosine, peak=0.04, final=0.4)
  value = schedules.stretched(
    89_999, 90_000, schedule=decay, scale=1.25, ahead=1
  )
  assert value == pytest.approx(0.36562, rel=1e-5)


def test_past_the_end_values_hold_or_formulas_go_on():
  for schedule, want in (
    (functools.partial(schedules.linear, peak=1.0), -0.5),
    (functools.partial(schedules.warmup_cosine, peak=1.0), 0.5),
    (
      functools.partial(
        schedules.warmup_stable_decay, peak=1.0, decay_steps=10
      ),
      -0.5,
    ),
  ):
    assert schedule(15, 10) == pytest.approx(0.0, abs=1e-12)
    assert schedule(15, 10, past_end='extend') == pytest.approx(want)
