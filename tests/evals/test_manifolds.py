"""Check precision and recall on sets whose answer is plain."""

import numpy as np
import pytest

from vfm_jax.evals import manifolds
from vfm_jax.evals.manifolds import precision_recall

RNG = np.random.default_rng(0)


def test_equal_sets_cover_each_other():
  x = RNG.normal(size=(40, 5)) + 100
  assert precision_recall(x, x) == (1.0, 1.0)
  assert precision_recall(x, x[RNG.permutation(40)] + 1e3) == (0.0, 0.0)


def test_a_narrow_set_is_precise_and_recalls_little(monkeypatch):
  real = RNG.normal(size=(200, 2))
  narrow = 0.05 * RNG.normal(size=(100, 2))
  precision, recall = precision_recall(real, narrow)
  assert precision > 0.9
  assert recall < 0.2
  assert precision_recall(narrow, real) == (recall, precision)
  # Blocks change nothing.
  monkeypatch.setattr(manifolds, '_BLOCK', 7)
  assert precision_recall(real, narrow) == (precision, recall)


def test_mistakes_are_told():
  with pytest.raises(ValueError, match='k: expected 1 to 2'):
    precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))
  with pytest.raises(ValueError, match=r'\(9, 2\) and \(9, 3\)'):
    precision_recall(np.zeros((9, 2)), np.zeros((9, 3)))
