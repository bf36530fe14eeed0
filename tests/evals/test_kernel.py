"""Check the kernel distance: equal distributions, other ones, mistakes."""

import numpy as np
import pytest

from vfm_jax.evals.kernel import kernel_distance, unbiased_mmd

RNG = np.random.default_rng(0)


def test_unbiased_for_equal_distributions():
  values = [unbiased_mmd(*RNG.normal(size=(2, 20, 4))) for _ in range(400)]
  assert abs(np.mean(values)) < 4 * np.std(values) / 20
  assert min(values) < 0


def test_grows_with_the_shift():
  x, y = RNG.normal(size=(2, 50, 4))
  means = [
    kernel_distance(x, y + shift, subsets=5, subset_size=40)[0]
    for shift in (0.0, 1.0, 2.0)
  ]
  assert means == sorted(means)
  # All rows in each subset: nothing is drawn.
  mean, std = kernel_distance(x, y, subsets=3, subset_size=50)
  assert mean == pytest.approx(unbiased_mmd(x, y), abs=1e-12)
  assert std < 1e-12


def test_mistakes_are_told():
  x = np.zeros((5, 2))
  with pytest.raises(ValueError, match='subset_size: expected 2 to 5'):
    kernel_distance(x, np.zeros((9, 2)), subset_size=6)
  with pytest.raises(ValueError, match=r'\(5, 2\) and \(5, 3\)'):
    kernel_distance(x, np.zeros((5, 3)), subset_size=2)
