"""Check the features that probes share."""

import numpy as np
import pytest

from vfm_jax.evals.base import Features, class_count, top1


def test_clips_and_take():
  f = Features.of_clips(
    [np.full((m, 2), i) for i, m in enumerate((2, 1, 3))], [4, 5, 6]
  )
  np.testing.assert_array_equal(f.counts, [2, 1, 3])
  assert not f.one_row_each
  g = f.take(np.array([2, 0]))
  np.testing.assert_array_equal(g.x[:, 0], [2, 2, 2, 0, 0])
  np.testing.assert_array_equal(g.y, [6, 4])
  np.testing.assert_array_equal(g.video, [0, 0, 0, 1, 1])
  assert class_count(f, g) == 7


def test_top1():
  assert top1(np.eye(4), [0, 1, 0, 3]) == 0.75


@pytest.mark.parametrize(
  ('x', 'y', 'video', 'match'),
  [
    (np.zeros(3), [0], [0], 'need x'),
    (np.zeros((2, 1)), [0, 1], [1, 0], 'order'),
    (np.zeros((2, 1)), [0, 1], [0, 0], 'at least one row'),
    (np.zeros((1, 1)), [-1], [0], 'labels must be 0 or more'),
  ],
)
def test_errors(x, y, video, match):
  with pytest.raises(ValueError, match=match):
    Features(np.asarray(x), np.asarray(y), np.asarray(video))
