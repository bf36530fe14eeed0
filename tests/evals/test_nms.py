import numpy as np
import pytest

from vfm_jax.evals import nms

SEGMENTS = np.array([[0, 10], [1, 11], [20, 30], [0, 9.5]], np.float32)
SCORES = np.array([0.9, 0.8, 0.7, 0.6], np.float32)


def test_soft_suppression_lowers_scores():
  index, scores = nms.soft_nms(SEGMENTS, SCORES, sigma=0.5)
  assert index.tolist() == [0, 2, 1, 3]
  np.testing.assert_allclose(
    scores, [0.9, 0.7, 0.20972, 0.02990], rtol=1e-3, atol=1e-5
  )
  first, _ = nms.soft_nms(SEGMENTS, SCORES, sigma=0.5, count=2)
  assert first.tolist() == [0, 2]


def test_duplicates_decay_and_the_order_does_not_matter():
  twice = SEGMENTS[[0, 0, 2]]
  _, scores = nms.soft_nms(
    twice, np.array([0.9, 0.9, 0.8], np.float32), sigma=0.5
  )
  np.testing.assert_allclose(scores, [0.9, 0.8, 0.9 * np.exp(-2)], rtol=1e-5)
  order = np.array([2, 0, 3, 1])
  a, _ = nms.soft_nms(SEGMENTS, SCORES, min_score=0.1)
  b, _ = nms.soft_nms(SEGMENTS[order], SCORES[order], min_score=0.1)
  assert set(a) == set(order[b])


def test_hard_suppression_and_the_first_is_never_dropped():
  assert nms.hard_nms(SEGMENTS, SCORES, threshold=0.5).tolist() == [0, 2]
  one = nms.hard_nms(SEGMENTS, SCORES, threshold=0.5, min_score=0.75)
  assert one.tolist() == [0]
  index, _ = nms.soft_nms(SEGMENTS, SCORES, min_score=2.0)
  assert index.tolist() == [0]


def test_voting_and_the_segment_without_length():
  spans = np.array([[0, 10], [0, 8], [5, 5]], np.float32)
  scores = np.array([0.75, 0.25, 0.5], np.float32)
  voted = nms.vote(spans[[0, 2]], spans, scores, 0.7)
  np.testing.assert_allclose(voted, [[0, 9.5], [5, 5]])
  released = nms.vote(spans[[0, 2]], spans, scores, 0.7, lone='nan')
  assert np.isnan(released[1]).all()


@pytest.mark.parametrize('method', ['hard', 'linear', 'gaussian'])
def test_nothing_in_nothing_out(method):
  index, scores = nms.soft_nms(np.zeros((0, 2)), np.zeros(0), method=method)
  assert len(index) == len(scores) == 0
