"""Check the score of classifiers that are sure, unsure and monotonous."""

import numpy as np
import pytest

from vfm_jax.evals.inception_score import inception_score


def test_bounds():
  assert inception_score(np.zeros((12, 7))) == pytest.approx(1.0)
  sure = 1e3 * np.eye(7)[np.arange(70) % 7]
  assert inception_score(sure) == pytest.approx(7.0)
  assert inception_score(sure[::7]) == pytest.approx(1.0)


def test_splits_are_averaged():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(25, 4))
  want = np.mean([inception_score(logits[i : i + 10]) for i in (0, 10, 20)])
  assert inception_score(logits, split=10) == pytest.approx(want)
