"""Check the Fréchet distance against closed forms, and streaming moments."""

import numpy as np
import pytest

from vfm_jax.evals.frechet import Moments, Normal, frechet_distance


def rows(seed, n=60, d=12):
  rng = np.random.default_rng(seed)
  return rng.normal(3.0, 1.0, (n, d)) @ rng.normal(size=(d, d))


def test_closed_forms():
  a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 0.0])
  normals = [Normal(np.zeros(3), np.diag(a)), Normal(np.ones(3), np.diag(b))]
  want = 3.0 + np.square(np.sqrt(a) - np.sqrt(b)).sum()
  assert frechet_distance(*normals) == pytest.approx(want, abs=1e-12)
  # A common rotation changes nothing; neither does the order of the two.
  q = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
  turned = [Normal(q @ m, q @ s @ q.T) for m, s in normals]
  assert frechet_distance(*turned[::-1]) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize('n', [6, 60])
def test_no_distance_to_itself_also_when_singular(n):
  normal = Moments.of(rows(0, n)).normal()
  assert abs(frechet_distance(normal, normal)) < 1e-9
  assert frechet_distance(normal, Moments.of(rows(1, n)).normal()) > 1


def test_order_and_parts_change_nothing():
  x = rows(2) + 1e4  # squares of raw values would lose the digits
  whole = Moments.of(x).normal()
  np.testing.assert_allclose(whole.mean, x.mean(0), rtol=1e-14)
  np.testing.assert_allclose(whole.cov, np.cov(x.T), rtol=1e-9)
  other = Moments.of(rows(3) + 1e4).normal()
  want = frechet_distance(whole, other)
  shuffled = np.random.default_rng(0).permutation(x)
  for sizes in ([1] * 60, [7] * 8 + [4], [59, 1]):
    parts = np.split(shuffled, np.cumsum(sizes)[:-1])
    total = Moments.of(parts[0])
    for part in parts[1:]:
      total = total.merge(Moments.of(part))
    assert total.count == 60
    assert frechet_distance(total.normal(), other) == pytest.approx(
      want, rel=1e-9, abs=1e-6
    )


def test_mistakes_are_told():
  good = Normal(np.zeros(2), np.eye(2))
  with pytest.raises(ValueError, match=r'one dimension, found .*\(3,\)'):
    frechet_distance(good, Normal(np.zeros(3), np.eye(3)))
  with pytest.raises(ValueError, match='finite'):
    frechet_distance(good, Normal(np.array([0, np.nan]), np.eye(2)))
  with pytest.raises(ValueError, match='eigenvalue -1 below zero'):
    frechet_distance(good, Normal(np.zeros(2), np.diag([1.0, -1.0])))
  with pytest.raises(ValueError, match='2 rows, found 1'):
    Moments.of(np.zeros((1, 2))).normal()
  with pytest.raises(ValueError, match=r'rows \[n, D\]'):
    Moments.of(np.zeros((0, 2)))
