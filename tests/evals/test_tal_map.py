import numpy as np
import pytest

from vfm_jax.evals.tal_annotations import Instance
from vfm_jax.evals.tal_map import Detections, mean_average_precision

TRUTH = {
  'a': [Instance(0, 4, 3), Instance(10, 14, 3)],
  'b': [Instance(5, 9, 3)],
}


def found(*rows):
  videos, starts, ends, labels, scores = zip(*rows, strict=True)
  return Detections(
    list(videos),
    np.stack([starts, ends], 1).astype(np.float32),
    np.array(labels),
    np.array(scores, np.float32),
  )


ROWS = (
  ('a', 0, 4, 3, 0.9),
  ('a', 0.5, 4.5, 3, 0.8),
  ('a', 10, 13, 3, 0.7),
  ('b', 5, 11, 3, 0.6),
  ('c', 0, 1, 3, 0.5),
)


def test_known_values():
  scores = mean_average_precision(TRUTH, found(*ROWS), (0.3, 0.5, 0.7, 0.75))
  np.testing.assert_allclose(
    scores.ap[:, 0], [5 / 6, 5 / 6, 5 / 9, 5 / 9], rtol=1e-6
  )


def test_perfect_and_wrong():
  perfect = found(('a', 0, 4, 3, 0.9), ('a', 10, 14, 3, 0.2), ('b', 5, 9, 3, 1))
  assert mean_average_precision(TRUTH, perfect, (0.5, 0.95)).average == 1
  wrong = found(('b', 0, 4, 3, 0.9))
  assert mean_average_precision(TRUTH, wrong, (0.5,)).average == 0


def test_two_detections_of_one_action_are_one_mistake():
  truth = {'a': [Instance(0, 4, 0)]}
  twice = found(('a', 0, 4, 0, 0.8), ('a', 0, 4.1, 0, 0.9))
  np.testing.assert_allclose(
    mean_average_precision(truth, twice, (0.5, 0.99)).ap[:, 0], [1, 0.5]
  )


def test_repeated_truth_counts_once_and_missing_classes_as_zero():
  truth = {
    'a': [Instance(0, 4, 0), Instance(0.0005, 4, 0), Instance(2, 2, 0)],
    'b': [Instance(1, 2, 5)],
  }
  scores = mean_average_precision(truth, found(('a', 0, 4, 0, 1.0)), (0.5,))
  assert scores.classes.tolist() == [0, 5]
  assert scores.ap.tolist() == [[1, 0]]


def test_unknown_classes_are_ignored_but_for_parity():
  # Class 3 is the truth's first; the release takes class 0 for it.
  rows = (('b', 0, 1, 0, 0.95), *ROWS)
  ours = mean_average_precision(TRUTH, found(*rows), (0.5,)).average
  np.testing.assert_allclose(ours, 5 / 6, rtol=1e-6)
  released = mean_average_precision(
    TRUTH, found(*rows), (0.5,), unknown='reindexed'
  )
  assert released.average < ours


def test_errors():
  with pytest.raises(ValueError, match='no action to find'):
    mean_average_precision({'a': []}, found(*ROWS), (0.5,))
  with pytest.raises(ValueError, match='not finite'):
    mean_average_precision(TRUTH, found(('a', 0, np.nan, 3, 1.0)), (0.5,))
