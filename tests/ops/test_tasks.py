import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.ops import tasks

RNG = np.random.default_rng(0)
solve = jax.jit(tasks.nash)


def gram_of(*rows):
  rows = np.array(rows, np.float64)
  return jnp.asarray(rows @ rows.T)


def brute_pcgrad(grads, order, against):
  out = []
  for i, others in enumerate(order):
    h = grads[i].copy()
    for j in others:
      if (j != i or against == 'all') and h @ grads[j] < 0:
        h -= (h @ grads[j]) / (grads[j] @ grads[j]) * grads[j]
    out.append(h)
  return np.sum(out, axis=0)


@pytest.mark.parametrize('against', ['others', 'all'])
def test_projections_equal_those_of_the_vectors(against):
  for k, width in ((3, 8), (6, 3)):
    grads = RNG.normal(size=(k, width)).astype(np.float32)
    order = np.stack([RNG.permutation(k) for _ in range(k)])
    w = tasks.projected(tasks.gram(grads), order, against)
    want = brute_pcgrad(grads, order, against)
    np.testing.assert_allclose(w @ grads, want, atol=1e-4)
  grads = np.array([[1, 0, 2], [-1, 1, 0.5], [0.5, -2, -1]], np.float32)
  order = np.tile(np.arange(3), (3, 1))
  w = tasks.projected(tasks.gram(grads), order, against)
  np.testing.assert_allclose(
    w @ grads, [-0.104762, -1.380952, 1.909524], atol=1e-5
  )


def test_projections_of_two_tasks():
  order = np.array([[0, 1], [1, 0]])
  agreeing = gram_of([1, 0, 0], [1, 2, 0])
  np.testing.assert_array_equal(tasks.projected(agreeing, order), [1, 1])
  g = np.array([[1.0, 0.0], [-2.0, 1.0]])
  w = tasks.projected(gram_of(*g), order)
  cos = g[0] @ g[1] / np.linalg.norm(g[0]) / np.linalg.norm(g[1])
  # Each is at right angles to the other task, which then gains by its own.
  want = (g * g).sum(1) * (1 - cos**2)
  np.testing.assert_allclose(g @ (w @ g), want, rtol=1e-5)
  scaled = tasks.projected(9 * gram_of(*g), order)
  np.testing.assert_allclose(scaled, w, rtol=1e-6)
  silent = tasks.projected(gram_of([1, 0], [0, 0]), order)
  np.testing.assert_array_equal(silent, [1, 1])


def test_nash_solution():
  with jax.enable_x64(True):
    g = RNG.normal(size=(5, 9))
    products = gram_of(*g)
    alpha, solved = solve(products)
    assert solved
    assert np.all(alpha > 0)
    np.testing.assert_allclose(alpha * (products @ alpha), 1, atol=1e-6)
    order = np.array([3, 0, 4, 1, 2])
    moved, _ = solve(products[order][:, order])
    np.testing.assert_allclose(moved, alpha[order], rtol=1e-6)
    scaled, _ = solve(4 * products)
    np.testing.assert_allclose(scaled, alpha / 2, rtol=1e-6)
    equal, _ = solve(9 * jnp.eye(4))
    np.testing.assert_allclose(equal, 1 / 3, rtol=1e-12)
    # Nearly opposed, and alike: the second has a singular matrix.
    hard, solved = solve(gram_of([1, 0], [-100, 1]))
    assert solved
    np.testing.assert_allclose(hard[0], 10001**0.5 * hard[1], rtol=1e-6)
    alike, solved = solve(gram_of([1, 2], [1, 2]))
    assert solved
    np.testing.assert_allclose(alike, 10**-0.5, rtol=1e-6)


@pytest.mark.parametrize(
  'products',
  [
    np.zeros((2, 2)),
    [[1.0, 0.0], [0.0, 0.0]],
    [[1.0, -1.0], [-1.0, 1.0]],
    [[np.nan, 0.0], [0.0, 1.0]],
    [[1.0, np.inf], [np.inf, 1.0]],
    [[np.inf, 0.0], [0.0, 1.0]],
  ],
)
def test_nash_tells_where_there_is_no_solution(products):
  _, solved = solve(jnp.asarray(products, jnp.float32))
  assert not solved
