"""Check the measures of temporal action segmentation."""

import numpy as np
import pytest

from vfm_jax.evals import tas_metrics as m


def labels(text):
  """Return `a3b2` as [0, 0, 0, 1, 1]."""
  names = 'abcz'
  pairs = zip(text[::2], text[1::2], strict=True)
  return np.concatenate([[names.index(c)] * int(n) for c, n in pairs])


BACKGROUND = 3  # z


def score(predicted, truth, protocol):
  return m.score_video(
    labels(predicted), labels(truth), BACKGROUND, protocol=protocol
  )


@pytest.mark.parametrize('protocol', ['exact', 'released'])
def test_known_values(protocol):
  out = score('z2a4b2z2', 'z2a3b3z2', protocol)
  assert (out.correct, out.frames, out.edit) == (9, 10, 100.0)
  np.testing.assert_array_equal(out.counts, [[2, 0, 0]] * 3)
  out = score('a2b1a1', 'a1b3', protocol)
  assert out.edit == pytest.approx(100 * (1 - 1 / 3))


def test_last_segment_ends_one_frame_early_in_the_released_code():
  y = labels('a3b3')
  np.testing.assert_array_equal(m.segments(y).ends, [3, 6])
  np.testing.assert_array_equal(m.segments(y, protocol='released').ends, [3, 5])
  # Of one frame it has no length, and not even itself as a match.
  alone = 'a3b1'
  np.testing.assert_array_equal(
    score(alone, alone, 'exact').counts, [[2, 0, 0]] * 3
  )
  np.testing.assert_array_equal(
    score(alone, alone, 'released').counts, [[1, 1, 1]] * 3
  )


def test_no_true_segment():
  exact = score('a2', 'z2', 'exact')
  np.testing.assert_array_equal(exact.counts, [[0, 1, 0]] * 3)
  assert score('z2', 'z2', 'exact').edit == 100
  assert np.isnan(score('z2', 'z2', 'released').edit)
  with pytest.raises(ValueError, match="use metrics='exact'"):
    score('a2', 'z2', 'released')


def test_only_the_best_overlap_is_tried():
  # Both predictions of a overlap the first true a most.
  out = score('a2b1a2b1c9a1c4', 'a6c9a1c4', 'exact')
  np.testing.assert_array_equal(out.counts[0], [4, 3, 0])


@pytest.mark.parametrize('protocol', ['exact', 'released'])
def test_perfect_shifted_and_broken(protocol):
  truth = 'a5b9c5b3'
  perfect = m.score_split([score(truth, truth, protocol)])
  assert set(perfect.values()) == {100.0}
  shifted = m.score_split([score('a6b9c5b2', truth, protocol)])
  assert shifted['edit'] == 100
  assert shifted['accuracy'] < 100
  broken = m.score_split([score('a5b4a1b4c5b3', truth, protocol)])
  assert broken['edit'] < 100
  assert broken['f1_10'] < 100
  # Classes are names: which number stands for which changes nothing.
  y, t = labels('a5b4a1b4c5b3'), labels(truth)
  renamed = np.array([2, 0, 1, 3])
  other = m.score_video(renamed[y], renamed[t], BACKGROUND, protocol)
  assert m.score_split([other]) == broken


def test_a_longer_prediction():
  """From sampling every other frame of an odd number."""
  longer = score('a3b3', 'a3b2', 'released')
  assert (longer.correct, longer.frames) == (5, 5)
  cut = score('a3b2c1', 'a3b2', 'exact')
  np.testing.assert_array_equal(cut.counts, [[2, 0, 0]] * 3)
  assert score('a3b2c1', 'a3b2', 'released').edit < 100
  with pytest.raises(ValueError, match='each of the 5 frames'):
    score('a3b1', 'a3b2', 'exact')


def test_videos_that_are_listed_only_count_in_the_edit_score():
  one = score('a2b2', 'a2b2', 'exact')
  out = m.score_split([one], listed=2)
  assert (out['edit'], out['accuracy'], out['f1_50']) == (50, 100, 100)
  with pytest.raises(ValueError, match='found 0'):
    m.score_split([])


def test_splits_are_averaged():
  a = m.score_split([score('a2b2', 'a2b2', 'exact')])
  b = m.score_split([score('b2a2', 'a2b2', 'exact')])
  out = m.mean_over_splits([a, b])
  assert out['accuracy'] == 50
  assert out['f1_mean'] == pytest.approx(50)
