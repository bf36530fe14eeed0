import numpy as np
import pytest

from vfm_jax.data import clips

RNG = np.random.default_rng


class Fixed:
  """Stand in for a generator: `integers` gives the low or the high end."""

  def __init__(self, high):
    self._high = high

  def integers(self, low, high, size=None):
    value = high - 1 if self._high else low
    return value if size is None else np.full(size, value)


SAMPLERS = (
  clips.uniform,
  clips.multi_clip,
  clips.videomae_pretrain,
  clips.videomae_dense_train,
  clips.videomae_dense_test,
  clips.segment_train,
  clips.segment_test,
  clips.vjepa_train,
)


@pytest.mark.parametrize('sampler', SAMPLERS)
@pytest.mark.parametrize('n', [1, 2, 3, 7, 15, 16, 17, 63, 64, 65, 301])
def test_indices_are_inside_and_ascending(sampler, n):
  for seed in range(5):
    sampled = clips.as_clips(sampler(n, 25.0, RNG(seed)), 25.0)
    indices, spans = sampled
    assert indices.dtype == np.int64
    assert indices.shape[1] == 16
    assert spans.shape == (len(indices), 2)
    assert indices.min() >= 0
    assert indices.max() < n
    assert (np.diff(indices, axis=1) >= 0).all()
    again = clips.as_clips(sampler(n, 25.0, RNG(seed)), 25.0).indices
    np.testing.assert_array_equal(again, indices)


def test_pretrain_window():
  take = clips.videomae_pretrain
  np.testing.assert_array_equal(
    take(100, 25, Fixed(high=False)), np.arange(0, 64, 4)
  )
  # The last start is n - 64, included.
  np.testing.assert_array_equal(
    take(100, 25, Fixed(high=True)), 36 + np.arange(0, 64, 4)
  )
  starts = {int(take(66, 25, RNG(s))[0]) for s in range(60)}
  assert starts == {0, 1, 2}


def test_pretrain_repeats_by_one_based_position():
  # n = 61: 1-based 1, 5, ..., 57; 57 + 4 < 61 is false, so index 56 repeats.
  expected = [*range(0, 57, 4), 56]
  got = clips.videomae_pretrain(61, 25, RNG(0))
  np.testing.assert_array_equal(got, expected)
  # n = 62: 57 + 4 < 62 still moves, to index 60.
  assert clips.videomae_pretrain(62, 25, RNG(0))[-1] == 60
  np.testing.assert_array_equal(
    clips.videomae_pretrain(10, 25, RNG(0)), [0, 4] + [8] * 14
  )
  # n = 9: 5 + 4 < 9 is false.
  np.testing.assert_array_equal(
    clips.videomae_pretrain(9, 25, RNG(0)), [0] + [4] * 15
  )
  np.testing.assert_array_equal(
    clips.videomae_pretrain(1, 25, RNG(0)), [0] * 16
  )


def test_pretrain_agrees_with_the_loop_of_the_rule():
  for n in range(1, 90):
    for stride in (2, 4):
      got = clips.videomae_pretrain(n, 25, Fixed(high=True), stride=stride)
      position, expected = max(n - 16 * stride, 0) + 1, []
      for _ in range(16):
        expected.append(position - 1)
        if position + stride < n:
          position += stride
      np.testing.assert_array_equal(got, expected)


def test_dense_train():
  take = clips.videomae_dense_train
  # n = 100, e = 64: linspace(0, 64, 16), step 64/15, end clipped to 63.
  expected = [0, 4, 8, 12, 17, 21, 25, 29, 34, 38, 42, 46, 51, 55, 59, 63]
  np.testing.assert_array_equal(take(100, 25, Fixed(high=False)), expected)
  np.testing.assert_array_equal(
    take(100, 25, Fixed(high=True)), 35 + np.array(expected)
  )
  # n = 64: linspace(0, 64, 16), no copies.
  np.testing.assert_array_equal(take(64, 25, RNG(0)), expected)
  # n = 20: linspace(0, 20, 5) = 0 5 10 15 20, then 20, clipped to 19.
  np.testing.assert_array_equal(
    take(20, 25, RNG(0)), [0, 5, 10, 15] + [19] * 12
  )
  # n = 3: nothing is sampled, all are copies of n.
  np.testing.assert_array_equal(take(3, 25, RNG(0)), [2] * 16)


def test_dense_test():
  # n = 300: 75 entries; starts floor(k 59 / 4) = 0 14 29 44 59.
  got = clips.videomae_dense_test(300, 25, RNG(0))
  assert got.shape == (5, 16)
  np.testing.assert_array_equal(got[:, 0], 4 * np.array([0, 14, 29, 44, 59]))
  np.testing.assert_array_equal(got[4], np.arange(236, 300, 4))
  # n = 20: entries 0 4 8 12 16, padded with 16; all clips coincide.
  got = clips.videomae_dense_test(20, 25, RNG(0))
  np.testing.assert_array_equal(got, [[0, 4, 8, 12] + [16] * 12] * 5)
  assert clips.videomae_dense_test(300, 25, RNG(0), clips=1)[0, 0] == 0


def test_umt_train():
  take = clips.umt_train
  drawn = np.stack(
    [take(100, 25.0, np.random.default_rng(i), frames=8) for i in range(400)]
  )
  # Segments of 12.5 frames; their edges are rounded to even.
  edges = np.array([0, 12, 25, 38, 50, 62, 75, 88, 100])
  np.testing.assert_array_equal(drawn.min(0), edges[:-1])
  np.testing.assert_array_equal(drawn.max(0), edges[1:] - 1)
  short = take(3, 25.0, np.random.default_rng(0), frames=8)
  assert (np.diff(short) >= 0).all()
  assert short.max() == 2


def test_segment_train():
  take = clips.segment_train
  np.testing.assert_array_equal(
    take(35, 25, Fixed(high=False)), np.arange(0, 32, 2)
  )
  np.testing.assert_array_equal(
    take(35, 25, Fixed(high=True)), np.arange(1, 32, 2)
  )
  np.testing.assert_array_equal(take(15, 25, RNG(0)), [0] * 16)
  np.testing.assert_array_equal(take(16, 25, RNG(0)), np.arange(16))


def test_segment_test():
  # n = 32: tick 2, indices 0 1 2 ... 31, alternating between the clips.
  got = clips.segment_test(32, 25, RNG(0))
  np.testing.assert_array_equal(got[0], np.arange(0, 32, 2))
  np.testing.assert_array_equal(got[1], np.arange(1, 32, 2))
  # n = 24: tick 1.5: {0 1 3 4 6 7 ...} and {0 2 3 5 6 8 ...}, sorted.
  got = clips.segment_test(24, 25, RNG(0))
  np.testing.assert_array_equal(got[0][:4], [0, 1, 3, 4])
  np.testing.assert_array_equal(got[1][:4], [0, 2, 3, 5])
  np.testing.assert_array_equal(
    clips.segment_test(1, 25, RNG(0)), [[0] * 16] * 2
  )


def test_uniform():
  got = clips.uniform(31, 25, RNG(0))
  np.testing.assert_array_equal(got, np.arange(0, 31, 2))
  np.testing.assert_array_equal(
    clips.uniform(32, 25, RNG(0)),
    [0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 31],
  )
  np.testing.assert_array_equal(
    clips.uniform(2, 25, RNG(0), frames=5), [0, 0, 0, 1, 1]
  )
  np.testing.assert_array_equal(clips.uniform(9, 25, RNG(0), frames=1), [4])
  for n in range(1, 70):
    for frames in (1, 2, 5, 8, 16):
      got = clips.uniform(n, 25, RNG(0), frames=frames)
      assert (np.diff(got) >= 0).all()
      if n % 2 or not frames % 2:  # else there is no middle frame
        np.testing.assert_array_equal(got, n - 1 - got[::-1])


def test_multi_clip():
  # 10 s at 25 fps, windows of 2 s: five of 50 frames.
  indices, spans = clips.multi_clip(250, 25.0, RNG(0))
  np.testing.assert_allclose(spans, [[0, 2], [2, 4], [4, 6], [6, 8], [8, 10]])
  np.testing.assert_array_equal(indices[:, 0], [0, 50, 100, 150, 200])
  np.testing.assert_array_equal(indices[:, -1], [49, 99, 149, 199, 249])
  # THUMOS: T = .5, Ts = .125, at 30 fps: floor((4 - .5) / .125) + 1 = 29.
  indices, spans = clips.multi_clip(120, 30.0, RNG(0), window=0.5, stride=0.125)
  assert len(indices) == 29
  np.testing.assert_allclose(spans[3], [0.375, 0.875])
  # Shorter than a window: one clip of the whole video.
  indices, spans = clips.multi_clip(20, 25.0, RNG(0))
  np.testing.assert_allclose(spans, [[0, 0.8]])
  assert indices.max() == 19
  indices, spans = clips.multi_clip(1, 25.0, RNG(0))
  np.testing.assert_array_equal(indices, [[0] * 16])


def test_spans_of_plain_samplers():
  got = clips.as_clips(np.arange(0, 50, 2), 25.0)
  np.testing.assert_allclose(got.spans, [[0, 49 / 25]])


def test_vjepa_windows_hold_both_ends():
  got = clips.vjepa_train(100, 30.0, Fixed(high=False), frames=4, stride=4)
  assert got.tolist() == [0, 5, 10, 15]
  got = clips.vjepa_train(100, 30.0, Fixed(high=True), frames=4, stride=4)
  assert got.tolist() == [83, 88, 93, 98]


def test_vjepa_repeats_the_last_frame_of_short_videos():
  got = clips.vjepa_train(9, 30.0, RNG(0), frames=4, stride=4)
  assert got.tolist() == [0, 8, 8, 8]
  got = clips.vjepa_train(2, 30.0, RNG(0), frames=4, stride=4)
  assert got.tolist() == [1, 1, 1, 1]


def test_vjepa_2_has_a_rate():
  for fps, step in ((29.97, 7), (12.0, 3), (2.0, 1)):
    got = clips.vjepa_train(999, fps, Fixed(high=False), frames=4, rate=4)
    assert got[-1] == 4 * step - 1
