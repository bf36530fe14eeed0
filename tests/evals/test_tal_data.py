import json

import numpy as np
import pytest

from vfm_jax.evals import store
from vfm_jax.evals.store import EmbeddingStore, StoreError
from vfm_jax.evals.tal_annotations import (
  Instance,
  read_annotations,
  without_duplicates,
)
from vfm_jax.evals.tal_data import (
  Item,
  Timing,
  Video,
  crop,
  cut,
  stretch,
)


def write(path, *actions, **entry):
  actions = [dict(segment=s, label=y) for s, y in actions]
  entry = dict(subset='training', duration=9.0, annotations=actions, **entry)
  path.write_text(json.dumps({'database': {'v': entry}}))
  return str(path)


def test_annotations_are_read_with_and_without_class_numbers(tmp_path):
  path = write(tmp_path / 'a.json', ([1, 2], 'run'), ([3, 5], 'jump'))
  read = read_annotations(path)
  assert read.classes == ('jump', 'run')
  assert read.subset('Training')['v'] == (Instance(1, 2, 1), Instance(3, 5, 0))
  assert read.durations == {'v': 9.0}
  with pytest.raises(StoreError, match="no subset 'test'; it has"):
    read.subset('test')
  text = (tmp_path / 'a.json').read_text()
  (tmp_path / 'a.json').write_text(
    text.replace('"run"', '"run", "label_id": 7')
  )
  with pytest.raises(StoreError, match="some, such as 'jump', have none"):
    read_annotations(path)


def test_an_action_that_ends_before_it_starts(tmp_path):
  path = write(tmp_path / 'a.json', ([5, 3], 'run'), ([1, 2], 'run'))
  with pytest.raises(StoreError, match=r"database\['v'\]: an action ends at 3"):
    read_annotations(path)
  assert read_annotations(path, invalid='drop').subset('training') == {
    'v': (Instance(1, 2, 0),)
  }


@pytest.mark.parametrize('segment', [[1], None, ['x', 2], [1, float('nan')]])
def test_bad_segments_are_refused(tmp_path, segment):
  path = write(tmp_path / 'a.json', (segment, 'run'))
  with pytest.raises(StoreError, match=r"a.json: database\['v'\]: .*segment"):
    read_annotations(path)


def test_repeated_actions_are_dropped():
  twice = [Instance(1, 2, 0), Instance(1.0005, 2, 0), Instance(1, 2, 1)]
  assert without_duplicates(twice) == (twice[0], twice[2])


@pytest.mark.parametrize('resize', [None, 192])
def test_seconds_and_steps_are_inverse(resize):
  grid = Timing(0.5, 0.25, resize).grid(345)
  seconds = np.array([[0.0, 3.5], [20.25, 86.0]])
  back = grid.to_seconds(grid.to_steps(seconds), 86.5)
  np.testing.assert_allclose(back, seconds, atol=1e-4)
  assert grid.to_seconds(np.array([1e6]), 86.5) == [86.5]


def item(root, clips, **kwargs):
  video = store.Embedding('v', clips, duration=9.0)
  reader = EmbeddingStore(str(root), 'set', 'val')
  store.write(reader.folder, video)
  actions = (Instance(1, 2, 3),)
  return Item('v', 'v', reader, actions, **kwargs)


def test_a_video_that_is_too_long_or_not_finite(tmp_path):
  clips = np.ones((12, 3))
  one = item(tmp_path, clips, timing=Timing(max_steps=10))
  with pytest.raises(StoreError, match=r'v_c\.npy: 12 rows, the longest video'):
    one.read()
  video = item(tmp_path, clips, timing=Timing(resize=8)).read()
  assert video.features.shape == (8, 3)
  broken = np.ones((12, 3), np.float32)
  broken[3] = np.nan
  np.save(one.path, broken)
  with pytest.raises(StoreError, match=r'v_c\.npy: NaN or infinity'):
    item_at(one).read()
  one.path.unlink()
  with pytest.raises(StoreError, match=r'v_c\.npy: unreadable array'):
    item_at(one).read()


def item_at(one):
  return Item(one.id, one.file, one.store, one.actions, Timing(), cache=False)


def test_classless_videos_have_class_0(tmp_path):
  one = item(tmp_path, np.ones((12, 3)), timing=Timing(), classless=True)
  assert one.read().labels.tolist() == [0]


def test_timing_must_be_that_of_the_store(tmp_path):
  reader = EmbeddingStore(str(tmp_path), 'set', 'val')
  clips = np.ones((4, 3), np.float32)
  video = store.Embedding('v', clips, duration=9.0, stride=0.5)
  store.write(reader.folder, video)
  with pytest.raises(StoreError, match=r'v\.json: stride is 0.5 s, expected'):
    Item('v', 'v', reader, (), Timing()).read()


def test_stretching_keeps_a_ramp():
  ramp = np.arange(8, dtype=np.float32)[:, None]
  np.testing.assert_allclose(
    stretch(ramp, 16)[:, 0], np.clip((np.arange(16) + 0.5) / 2 - 0.5, 0, 7)
  )
  np.testing.assert_allclose(stretch(ramp, 4)[:, 0], [0.5, 2.5, 4.5, 6.5])


def test_crops_hold_an_action_and_cut_it():
  features = np.arange(20, dtype=np.float32)[:, None]
  spans = np.array([[2, 6], [15, 18]], np.float32)
  video = Video(features, spans, np.array([0, 1], np.int32))
  starts = iter([8, 4])
  out = crop(video, 6, draw=lambda low, high: next(starts))
  assert out.features[0, 0] == 4
  assert out.segments.tolist() == [[0, 2]]
  assert out.labels.tolist() == [0]
  assert crop(video, 20, draw=max, ratio=None) is video
  ended = cut(Video(features[:16], spans, video.labels))
  assert ended.segments.tolist() == [[2, 6], [15, 16.5]]
  assert cut(Video(features[:15], spans, video.labels)).labels.tolist() == [0]
