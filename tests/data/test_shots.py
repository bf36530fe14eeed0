import av
import numpy as np
import pytest

from vfm_jax.data import shots
from vfm_jax.data.folder import FolderCSV
from vfm_jax.evals.tal_annotations import read_annotations
from vfm_jax.evals.tas_data import FrameLabels

FPS, CUTS = 10, (23, 41, 62, 95)


def scenes(num_frames=120):
  """Yield frames whose palette changes at the cuts, and drifts between."""
  rng = np.random.default_rng(0)
  for i in range(num_frames):
    scene = sum(i >= cut for cut in CUTS)
    colour = np.array([40 * scene, 200 - 30 * scene, 90]) + i % 4
    noise = rng.integers(0, 20, (36, 64, 3))
    yield (colour + noise).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope='module')
def film(tmp_path_factory):
  path = tmp_path_factory.mktemp('film') / 'film.mp4'
  with av.open(str(path), 'w') as out:
    stream = out.add_stream('libx264', rate=FPS, options={'crf': '12'})
    stream.width, stream.height, stream.pix_fmt = 64, 36, 'yuv420p'
    for frame in scenes():
      out.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
    out.mux(stream.encode())
  return str(path)


def test_cuts_are_found_where_colours_change():
  found = shots.find_cuts(shots.changes(scenes()))
  np.testing.assert_array_equal(found, CUTS)


def test_steady_change_is_no_cut():
  picture = np.random.default_rng(0).uniform(0, 255, (36, 64, 3))
  fade = ((picture * (1 - i / 240)).astype(np.uint8) for i in range(120))
  assert not len(shots.find_cuts(shots.changes(fade)))


def test_annotations_read_as_those_of_the_benchmarks(film, tmp_path):
  parts = shots.prepare(film, str(tmp_path), seconds=4, val=0.3, height=36)
  assert [p.cuts for p in parts] == [(23,), (1, 22), (15,)]
  found = read_annotations(str(tmp_path / 'shots.json'))
  assert set(found.subset('training')) == {'part_000', 'part_002'}
  (one,) = found.subset('validation').values()
  spans = [(a.start, a.end) for a in one]
  assert spans == [(0.0, 0.1), (0.1, 2.2), (2.2, 4.0)]
  labels = FrameLabels(str(tmp_path / 'cuts'))
  assert labels.split('test', 1) == ['part_001']
  near = labels.frames('part_001')
  np.testing.assert_array_equal(np.flatnonzero(near), [0, 1, 2, 20, 21, 22, 23])
  for split, count in (('train', 2), ('val', 1), ('all', 3)):
    listed = FolderCSV(
      str(tmp_path / 'videos'),
      str(tmp_path / f'{split}.csv'),
      label_columns=(),
    )
    assert len(listed) == count
  assert listed[0].open().num_frames == 40


def test_a_film_that_is_too_short_is_refused(film, tmp_path):
  with pytest.raises(ValueError, match=r'one part of 200 frames.*--seconds'):
    shots.prepare(film, str(tmp_path), seconds=20)
  with pytest.raises(ValueError, match='1 parts, 1 of them for validation'):
    shots.prepare(film, str(tmp_path), seconds=12)
