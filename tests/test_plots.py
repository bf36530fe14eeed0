"""Check that pictures have the content and the size that they should."""

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from vfm_jax import plots


def clips(b=3, t=6, h=16, w=24):
  rng = np.random.default_rng(0)
  return {
    kind: rng.integers(0, 255, (b, t, h, w, 3), dtype=np.uint8)
    for kind in ('original', 'masked', 'a_reconstruction_with_a_long_name')
  }


def curves(n=100):
  steps = np.arange(1, n + 1)
  return {
    'loss': (steps, 100.0 / steps),
    'lr': (steps, np.linspace(1e-3, 0, n)),
    'skipped': (steps, np.zeros(n)),
    'probes/scene_knn20_top1': (steps[:3], np.array([0.1, np.nan, 0.5])),
    'aux': (steps[:2], np.ones(2)),
  }


def test_read_jsonl(tmp_path):
  path = tmp_path / 'm.jsonl'
  rows = [
    {'step': 20, 'time': 1.0, 'loss': 2.0},
    {'step': 10, 'time': 2.0, 'loss': 1, 'text': {'a': 'b'}},
    {'step': 20, 'time': 3.0, 'loss': None, 'x/y': 5.0},
  ]
  path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
  got = plots.read_jsonl(path)
  assert set(got) == {'loss', 'x/y'}
  np.testing.assert_array_equal(got['loss'][0], [10, 20])
  np.testing.assert_array_equal(got['loss'][1], [1, np.nan])
  assert got['x/y'][0].dtype == np.int64


def test_curves(tmp_path):
  before = 'matplotlib.pyplot' in sys.modules
  path = plots.plot_curves(curves(), tmp_path / 'c.png', title='a run')
  assert ('matplotlib.pyplot' in sys.modules) == before
  with Image.open(path) as picture:
    # Four panels (a metric that is 0 all along is none) in two rows.
    assert picture.size == (round(4.2 * 3 * 110), round((2.7 * 2 + 0.4) * 110))
    assert np.asarray(picture.convert('RGB')).std() > 5


def test_curves_from_a_file_and_of_one_point(tmp_path):
  path = tmp_path / 'm.jsonl'
  path.write_text('{"step": 1, "loss": 0.5}\n')
  out = plots.plot_curves(path, tmp_path / 'c.png')
  assert Image.open(out).width == round(4.2 * 110)


def test_no_curves(tmp_path):
  with pytest.raises(ValueError, match='no curves to draw'):
    plots.plot_curves({}, tmp_path / 'c.png')


def test_grid_shows_the_frames_in_place(tmp_path):
  videos = clips()
  path = plots.clip_grid(videos, tmp_path / 'g.png', clips=2, frames=3)
  picture = np.asarray(Image.open(path))
  h, w = 16 * 4, 24 * 4  # enlarged to 96 pixels
  left, top, gap, apart = 104, 26, 3, 14
  clip_h = 3 * (h + gap)
  assert picture.shape == (
    top + 2 * clip_h + apart + 8,
    left + 3 * (w + gap) + 8,
    3,
  )
  for i in range(2):
    for r, video in enumerate(videos.values()):
      for j, frame in enumerate((0, 2, 5)):
        y = top + i * (clip_h + apart) + r * (h + gap)
        x = left + j * (w + gap)
        shown = picture[y : y + h : 4, x : x + w : 4]
        np.testing.assert_array_equal(shown, video[i, frame])


def test_animation_loops_over_all_frames(tmp_path):
  videos = {k: (v // 128) * 200 for k, v in clips(b=1).items()}
  path = plots.animate(videos, tmp_path / 'a.gif', fps=10)
  with Image.open(path) as picture:
    assert picture.n_frames == 6
    assert picture.info['loop'] == 0
    assert picture.info['duration'] == 100
    assert picture.size == (4 + 3 * (144 + 4), 22 + 96 + 4)
    assert plots.gif_size(path.read_bytes()) == picture.size[::-1]
    for t in range(6):
      picture.seek(t)
      shown = np.asarray(picture.convert('RGB'))[22 : 22 + 96 : 6]
      shown = shown[:, 4 : 4 + 144 : 6]
      np.testing.assert_allclose(shown, videos['original'][0, t], atol=2)


def test_animation_of_a_still_picture_is_one_frame():
  still = {'a': np.zeros((1, 1, 8, 8, 3), np.uint8)}
  assert Image.open(io.BytesIO(plots.gif_bytes(still))).n_frames == 1


@pytest.mark.parametrize(
  'videos',
  [
    {},
    {'a': np.zeros((2, 3, 8, 8, 3))},
    {'a': np.zeros((3, 8, 8, 3), np.uint8)},
    {
      'a': np.zeros((2, 3, 8, 8, 3), np.uint8),
      'b': np.zeros((2, 3, 8, 9, 3), np.uint8),
    },
  ],
)
def test_shapes_must_fit(videos, tmp_path):
  with pytest.raises(ValueError, match=r'uint8 \[B, T, H, W, 3\]'):
    plots.clip_grid(videos, tmp_path / 'g.png')
  with pytest.raises(ValueError, match=r'uint8 \[B, T, H, W, 3\]'):
    plots.gif_bytes(videos)


def test_images_go_in_columns(tmp_path):
  images = clips(b=5, t=1)
  path = plots.clip_grid(images, tmp_path / 'g.png', frames=4)
  one = plots.clip_grid(
    {k: v[:1] for k, v in images.items()}, tmp_path / 'one.png'
  )
  with Image.open(path) as four, Image.open(one) as single:
    assert four.height == single.height
    assert four.width > 2 * (single.width - 104)


def test_sample_grid_shows_each_sample_in_its_place(tmp_path):
  values = np.arange(5, dtype=np.uint8) * 50
  samples = np.broadcast_to(values[:, None, None, None, None], (5, 1, 8, 8, 3))
  path = plots.sample_grid(samples, tmp_path / 's')
  assert path.suffix == '.png'
  with Image.open(path) as picture:
    pixels = np.asarray(picture)
  cell = (pixels.shape[0] - 2) // 2  # two rows of three columns
  assert pixels.shape[1] == 2 + 3 * cell
  seen = [
    pixels[2 + r * cell + cell // 2, 2 + c * cell + cell // 2, 0]
    for r, c in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))
  ]
  assert seen == values.tolist()
  moving = np.concatenate([samples, 255 - samples], 1)
  path = plots.sample_grid(moving, tmp_path / 's')
  with Image.open(path) as animation:
    assert (path.suffix, animation.n_frames) == ('.gif', 2)
