"""Check how annotations and features of long videos are read."""

import pathlib

import numpy as np
import pytest

from vfm_jax.evals.store import StoreError
from vfm_jax.evals.tas_data import (
  AnnotationError,
  FrameLabels,
  resample,
  runs,
)


@pytest.fixture
def labels(tmp_path):
  for name in ('groundTruth', 'splits', 'features'):
    (tmp_path / name).mkdir()
  (tmp_path / 'mapping.txt').write_text('0 pour\n1 stir\n')
  (tmp_path / 'splits/train.split1.bundle').write_text('v1.txt\nv2.txt\n')
  truth = tmp_path / 'groundTruth'
  (truth / 'v1.txt').write_text('pour\nstir\nstir\n')
  (truth / 'v2.txt').write_text('1-2 pour\n3-5 stir \n')
  np.save(tmp_path / 'features/v1_c.npy', np.array([[0.0], [1.0]]))
  np.save(tmp_path / 'features/v2_c.npy', np.ones((5, 1), np.float32))
  return FrameLabels(str(tmp_path))


def test_reads_frames_segments_and_bundles(labels):
  assert labels.classes == ('pour', 'stir')
  assert labels.split('train', 1) == ['v1', 'v2']
  np.testing.assert_array_equal(labels.frames('v1'), [0, 1, 1])
  np.testing.assert_array_equal(labels.frames('v2'), [0, 0, 1, 1, 1])
  expected = [(0.0, 0.5, 'pour'), (0.5, 1.5, 'stir')]
  assert runs(labels.frames('v1'), labels.classes, fps=2.0) == expected


def test_loads_every_other_frame_of_an_odd_number(labels):
  folder = pathlib.Path(labels.root, 'features')
  videos = labels.load(['v1', 'v2'], folder, sample_rate=2)
  assert [len(v.y) for v in videos] == [2, 3]
  np.testing.assert_array_equal(videos[1].y, [0, 1, 1])
  assert len(videos[1].frames) == 5
  assert videos[1].x.shape == (3, 1)


def test_interpolates_between_the_middles_of_cells():
  np.testing.assert_allclose(
    resample(np.array([[0.0], [4.0]], np.float32), 4)[:, 0], [0, 1, 3, 4]
  )
  one = np.full((1, 2), 3.0, np.float32)
  np.testing.assert_array_equal(resample(one, 7), np.full((7, 2), 3.0))
  assert resample(one, 1) is one


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('pour\nmix\n', r"v1\.txt:2: unknown class 'mix'"),
    ('1-2 pour\n4-3 stir\n', r'v1\.txt:2: the segment ends before it starts'),
    ('1-2 pour\n4-6 stir\n', r'v1\.txt:2: expected a segment from frame 3'),
    ('1-2 mix\n', r"v1\.txt:1: unknown class 'mix'"),
    ('1-2 pour\nstir\n', r'v1\.txt:2: expected `first-last name`'),
    ('\n', r'v1\.txt: is empty'),
    (None, r'v1\.txt: unreadable'),
  ],
)
def test_wrong_annotations_are_named(labels, text, message):
  path = pathlib.Path(labels.root, 'groundTruth/v1.txt')
  path.unlink() if text is None else path.write_text(text)
  with pytest.raises(AnnotationError, match=message):
    labels.frames('v1')


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('pour 0\n', r'mapping\.txt:1: expected `number name`'),
    ('0 pour\n2 stir\n', r'expected classes 0 to 1, found \[0, 2\]'),
    ('0 pour\n0 stir\n', r'mapping\.txt:2: .* is there already'),
  ],
)
def test_wrong_classes_are_named(labels, text, message):
  pathlib.Path(labels.root, 'mapping.txt').write_text(text)
  with pytest.raises(AnnotationError, match=message):
    _ = FrameLabels(labels.root).classes


def test_a_video_listed_twice_is_named(labels):
  bundle = pathlib.Path(labels.root, 'splits/train.split1.bundle')
  bundle.write_text('v1.txt\nv1.txt\n')
  with pytest.raises(AnnotationError, match=r"split1.*\['v1'\] more than once"):
    labels.split('train', 1)


def test_missing_and_wrong_features_are_named(labels):
  folder = pathlib.Path(labels.root, 'features')
  np.save(folder / 'v2_c.npy', np.ones((5, 2), np.float32))
  with pytest.raises(StoreError, match=r'v2_c\.npy: 2 features.*v1 have 1'):
    labels.load(['v1', 'v2'], folder)
  (folder / 'v2_c.npy').write_bytes(b'')
  with pytest.raises(StoreError, match=r'v2_c\.npy: unreadable'):
    labels.load(['v1', 'v2'], folder)
  (folder / 'v2_c.npy').unlink()
  with pytest.raises(StoreError, match=r'v2_c\.npy'):
    labels.load(['v1', 'v2'], folder)
  left = labels.load(['v1', 'v2'], folder, missing='skip')
  assert [v.id for v in left] == ['v1']
  with pytest.raises(AnnotationError, match='features of none of 1 videos'):
    labels.load(['v2'], folder, missing='skip')
