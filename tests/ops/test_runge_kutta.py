"""Check integration at fixed steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.ops.runge_kutta import TABLEAUS, Fixed, Solver

ORDERS = dict(euler=1, midpoint=2, heun=2, heun3=3, rk4=4)


def error(method, steps):
  """Return the error of 1 / (1 + t + t^2 / 2) at t = 1."""
  y = Fixed(method).integrate(
    lambda y, t, i: -(y**2) * (1 + t[:, None]),
    jnp.ones((1, 1)),
    np.linspace(0, 1, 1 + steps),
  )
  return abs(float(y[0, 0]) - 0.4)


@pytest.mark.parametrize('method', TABLEAUS)
def test_order(method):
  assert isinstance(Fixed(method), Solver)
  coarse, fine = error(method, 4), error(method, 8)
  assert np.log2(coarse / fine) == pytest.approx(ORDERS[method], abs=0.35)


@pytest.mark.parametrize('method', TABLEAUS)
def test_evaluations_are_counted(method):
  """Sum the numbers of the evaluations by a field that depends on them."""
  stages = len(TABLEAUS[method].nodes)
  seen = []

  def field(y, t, i):
    jax.debug.callback(lambda i: seen.append(int(i)), i)
    return jnp.zeros_like(y)

  Fixed(method).integrate(field, jnp.ones((2, 1)), np.linspace(0, 1, 4))
  jax.effects_barrier()
  assert sorted(seen) == list(range(3 * stages))


def test_path_forward_and_back():
  times = np.linspace(0.5, 2, 31)
  y = {'a': jnp.ones((2, 3)), 'b': jnp.full((2, 1), 2.0)}

  def field(y, t, i):
    return {k: v * jnp.cos(t)[:, None] for k, v in y.items()}

  states = Fixed('rk4').integrate(field, y, times, path=True)
  exact = np.exp(np.sin(times) - np.sin(0.5))
  np.testing.assert_allclose(states['a'][:, 1, 2], exact, rtol=1e-5)
  np.testing.assert_allclose(states['b'][:, 0, 0], 2 * exact, rtol=1e-5)
  end = {k: v[-1] for k, v in states.items()}
  back = Fixed('rk4').integrate(field, end, times[::-1])
  np.testing.assert_allclose(back['a'], y['a'], rtol=1e-5)


def test_unknown_method_is_named():
  with pytest.raises(ValueError, match=r"solver\.method.*found 'rk5'"):
    Fixed('rk5')
