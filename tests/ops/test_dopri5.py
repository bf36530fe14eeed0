"""Check integration at adaptive steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.ops.dopri5 import Dopri5
from vfm_jax.ops.runge_kutta import Solver


def swing(y, t, i):
  """Return the slope of y(0) exp(sin(rate t)), the rate in column 0."""
  rate = y[:, :1]
  slope = y[:, 1:] * (rate * jnp.cos(rate * t[:, None]))
  return jnp.concatenate([jnp.zeros_like(rate), slope], 1)


def start(*rates):
  return jnp.stack([jnp.array(rates), jnp.ones(len(rates))], 1)


TIMES = np.linspace(0, 2, 9)


@pytest.mark.parametrize('norm', ['sample', 'batch'])
@pytest.mark.parametrize('rtol', [1e-3, 1e-5])
def test_accuracy_at_and_between_the_ends(norm, rtol):
  solver = Dopri5(rtol=rtol, norm=norm)
  assert isinstance(solver, Solver)
  rates = np.array([0.5, 1.0, 3.0])
  run = jax.jit(lambda y: solver.integrate(swing, y, TIMES, path=True))
  states = run(start(*rates))
  exact = np.exp(np.sin(TIMES[:, None] * rates))
  np.testing.assert_allclose(states[..., 1], exact, rtol=10 * rtol)


def test_only_the_end_is_the_end_of_the_path():
  solver, y = Dopri5(), start(1.0, 2.0)
  whole = solver.integrate(swing, y, TIMES, path=True)
  np.testing.assert_array_equal(whole[0], y)
  end = solver.integrate(swing, y, TIMES)
  np.testing.assert_allclose(whole[-1], end, rtol=1e-5)


def test_backward_returns_to_the_start():
  solver, y = Dopri5(rtol=1e-5), start(1.0, 2.0)
  end = solver.integrate(swing, y, TIMES)
  back = solver.integrate(swing, end, TIMES[::-1])
  np.testing.assert_allclose(back, y, rtol=1e-4)


def test_a_sample_does_not_depend_on_its_batch():
  alone = Dopri5().integrate(swing, start(1.0), TIMES)
  among = Dopri5().integrate(swing, start(9.0, 1.0, 0.1), TIMES)
  np.testing.assert_allclose(among[1], alone[0], rtol=1e-6)
  shared = Dopri5(norm='batch').integrate(swing, start(9.0, 1.0, 0.1), TIMES)
  assert abs(shared[1, 1] - alone[0, 1]) > 1e-5


def test_the_field_is_never_asked_outside_of_the_interval():
  times = np.linspace(0.1, 0.9, 3)

  def field(y, t, i):
    inside = (t > 0.09) & (t < 0.91)
    return jnp.where(inside[:, None], jnp.full_like(y, 1e-4), jnp.nan)

  end = Dopri5().integrate(field, jnp.full((1, 2), 10.0), times)
  np.testing.assert_allclose(end, 10.0 + 0.8e-4, rtol=1e-6)


def test_what_cannot_arrive_is_nan():
  def field(y, t, i):
    return jnp.where(y > 4, jnp.nan, y)

  times = np.linspace(0, 1, 3)
  y = jnp.array([[1.0], [2.0]])
  states = Dopri5().integrate(field, y, times, path=True)
  np.testing.assert_allclose(states[:, 0, 0], np.exp(times), rtol=1e-3)
  assert np.isfinite(states[1, 1, 0])
  assert np.isnan(states[2, 1, 0])
  few = Dopri5(max_steps=1).integrate(swing, start(1.0), TIMES)
  assert np.isnan(few).all()


def test_unknown_norm_is_named():
  with pytest.raises(ValueError, match=r"solver\.norm.*found 'max'"):
    Dopri5(norm='max')
