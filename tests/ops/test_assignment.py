import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax import sharding
from vfm_jax.ops import assignment

RNG = np.random.default_rng(0)
solve = jax.jit(assignment.assign, static_argnames='impl')


def total(cost, match):
  assert sorted(np.asarray(match)) == list(range(len(cost)))
  return cost[np.arange(len(cost)), match].sum()


@pytest.mark.parametrize('high', [3, 1000])
def test_the_loop_finds_what_scipy_finds(high):
  for _ in range(10):
    cost = RNG.integers(0, high, (9, 9)).astype(np.int32)
    got, want = (solve(cost, impl=i) for i in ('device', 'host'))
    assert total(cost, got) == total(cost, want)


def test_equal_and_repeated_columns():
  same = np.full((9, 9), 7, np.int32)
  assert total(same, solve(same, impl='device')) == 63
  cost = np.repeat(RNG.integers(0, 9, (9, 3)), 3, 1).astype(np.int32)
  got, want = (solve(cost, impl=i) for i in ('device', 'host'))
  assert total(cost, got) == total(cost, want)
  np.testing.assert_array_equal(solve(cost, impl='auto'), got)


def test_on_a_mesh_each_device_solves_it_without_messages():
  cost = RNG.integers(0, 50, (8, 8)).astype(np.int32)
  mesh = sharding.make_mesh(sharding.Mesh())
  cut = jax.device_put(cost, sharding.batch_sharding(mesh))
  with sharding.activations(mesh):
    program = jax.jit(assignment.assign).lower(cut).compile()
  np.testing.assert_array_equal(program(cut), solve(cost))
  text = program.as_text()
  assert text.count('all-gather(') == 1  # of the costs, before the loop
  assert 'all-reduce(' not in text


def test_small_ones():
  assert assignment.assign(jnp.array([[5]])).tolist() == [0]
  cost = jnp.array([[4, 1, 3], [2, 0, 5], [3, 2, 2]])
  assert assignment.assign(cost).tolist() == [1, 0, 2]


@pytest.mark.parametrize(
  ('cost', 'impl', 'message'),
  [
    (jnp.zeros((2, 3), int), 'auto', r'\[P, P\], found int32\[2, 3\]'),
    (jnp.zeros((2, 2)), 'auto', 'found float32'),
    (jnp.zeros((2, 2), int), 'gpu', "found 'gpu'"),
  ],
)
def test_errors(cost, impl, message):
  with pytest.raises(ValueError, match=message):
    assignment.assign(cost, impl=impl)
