import functools

import numpy as np
import PIL.Image
import pytest

from vfm_jax.data import augment

RNG = np.random.default_rng


def clip(height=60, width=80, frames=3):
  y, x = np.mgrid[:height, :width]
  frame = np.stack([y, x, y + x], -1).astype(np.uint8)
  return np.stack([frame] * frames)


def box(frames, size):
  """Read the crop box back from an un-resized ramp."""
  return (
    frames[0, 0, 0, 0],
    frames[0, 0, 0, 1],
    frames.shape[1] if size is None else size,
  )


def test_multi_scale_crop_takes_every_box_and_no_other(monkeypatch):
  monkeypatch.setattr(
    augment, 'resize', lambda frames, h, w: frames[:, :, :, :]
  )
  sides = (60, 52, 45, 39)
  seen = set()
  for seed in range(1500):
    out = augment.multi_scale_crop(clip(), RNG(seed), size=20)
    h, w = out.shape[1:3]
    i, j = sides.index(h), sides.index(w)
    assert abs(i - j) <= 1
    top, left = int(out[0, 0, 0, 0]), int(out[0, 0, 0, 1])
    step_y, step_x = (60 - h) // 4, (80 - w) // 4
    assert top in {k * step_y for k in range(5)}
    assert left in {k * step_x for k in range(5)}
    seen.add((h, w, top, left))
  # 6 pairs without a full-height box have 13 places; (60, 60), (60, 52) have
  # one row: 5 places; (52, 60) has all 13.
  assert len({s[:2] for s in seen}) == 10
  assert len([s for s in seen if s[:2] == (45, 45)]) == 13
  assert len([s for s in seen if s[:2] == (60, 60)]) == 5


def test_multi_scale_crop_rounds_to_the_size(monkeypatch):
  monkeypatch.setattr(augment, 'resize', lambda frames, h, w: frames)
  heights = {
    augment.multi_scale_crop(clip(), RNG(s), size=50).shape[1]
    for s in range(100)
  }
  assert heights == {60, 50, 45, 39}


def test_multi_scale_crop_resizes_like_pillow():
  frames = RNG(0).integers(0, 256, (2, 60, 60, 3), np.uint8)
  out = augment.multi_scale_crop(frames, RNG(1), size=32, scales=(1.0,))
  expected = PIL.Image.fromarray(frames[1]).resize(
    (32, 32), PIL.Image.Resampling.BILINEAR
  )
  np.testing.assert_array_equal(out[1], np.asarray(expected))


@pytest.mark.parametrize('shape', [(1, 1), (5, 3), (37, 51), (240, 10)])
@pytest.mark.parametrize(
  'transform',
  [
    augment.multi_scale_crop,
    augment.random_resized_crop,
    augment.center_crop,
    augment.three_crops,
  ],
)
def test_any_size_comes_out_right(shape, transform):
  frames = clip(*shape)
  for seed in range(5):
    out = transform(frames, RNG(seed), size=16)
    assert out.shape[-4:] == (3, 16, 16, 3)
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, transform(frames, RNG(seed), size=16))


def test_all_frames_get_the_same_box():
  for fn in (augment.multi_scale_crop, augment.random_resized_crop):
    out = fn(clip(), RNG(3), size=20)
    np.testing.assert_array_equal(out[0], out[2])


def test_random_box_statistics():
  areas, ratios = [], []
  for seed in range(400):
    top, left, h, w = augment._random_box(
      1000, 1000, RNG(seed), (0.3, 0.6), (0.5, 2.0)
    )
    assert top + h <= 1000
    assert left + w <= 1000
    areas.append(h * w / 1e6)
    ratios.append(w / h)
  assert min(areas) > 0.29
  assert max(areas) < 0.61
  assert np.mean(areas) == pytest.approx(0.45, abs=0.02)
  assert np.mean(np.log(ratios)) == pytest.approx(0, abs=0.06)


def test_random_box_falls_back_to_the_centre():
  assert augment._random_box(10, 100, RNG(0), (1.0, 1.0), (0.75, 4 / 3)) == (
    0, 43, 10, 13,
  )  # fmt: skip


def test_center_crop_is_resize_then_crop_for_squares():
  np.testing.assert_array_equal(
    augment.center_crop(clip(60, 80), RNG(0), size=60),
    clip(60, 80)[:, :, 10:70],
  )


def test_resize_short_side():
  assert augment.resize_short_side(clip(60, 80), RNG(0), size=30).shape == (
    3, 30, 40, 3,
  )  # fmt: skip
  assert augment.resize_short_side(clip(80, 60), RNG(0), size=30).shape == (
    3, 40, 30, 3,
  )  # fmt: skip


def test_three_crops_along_the_long_side():
  wide = augment.three_crops(clip(60, 81), RNG(0), size=60)
  assert wide.shape == (3, 3, 60, 60, 3)
  # floor(j 21 / 2) = 0, 10, 21.
  assert [int(c[0, 0, 0, 1]) for c in wide] == [0, 10, 21]
  tall = augment.three_crops(clip(81, 60), RNG(0), size=60)
  assert [int(c[0, 0, 0, 0]) for c in tall] == [0, 10, 21]
  square = augment.three_crops(clip(60, 60), RNG(0), size=60)
  np.testing.assert_array_equal(square[0], square[2])
  one = augment.three_crops(clip(60, 80), RNG(0), size=60, crops=1)
  assert int(one[0, 0, 0, 0, 1]) == 10


def test_flip():
  always = augment.horizontal_flip(clip(), RNG(0), probability=1.0)
  np.testing.assert_array_equal(always, clip()[:, :, ::-1])
  np.testing.assert_array_equal(
    augment.horizontal_flip(clip(), RNG(0), probability=0.0), clip()
  )


def test_compose_runs_in_order_on_one_generator():
  both = augment.Compose(
    (
      functools.partial(augment.random_resized_crop, size=24),
      augment.horizontal_flip,
    )
  )
  rng = RNG(5)
  expected = augment.random_resized_crop(clip(), rng, size=24)
  expected = augment.horizontal_flip(expected, rng)
  np.testing.assert_array_equal(both(clip(), RNG(5)), expected)
  np.testing.assert_array_equal(augment.identity(clip(), RNG(0)), clip())
