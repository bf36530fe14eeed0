"""Check the embedding store: layout, what it tolerates, what it refuses."""

import json
import os
import urllib.parse

import numpy as np
import pytest

from vfm_jax.evals import store
from vfm_jax.evals.store import Embedding, EmbeddingStore, StoreError


@pytest.fixture
def folder(tmp_path):
  return store.split_folder(tmp_path, 'set', 'train', 'multi-clip')


@pytest.fixture
def reader(tmp_path):
  return EmbeddingStore(str(tmp_path), 'set', 'train', 'multi-clip')


def item(name='a', m=3, d=4, **kwargs):
  rng = np.random.default_rng(len(name))
  fields = dict(
    annotation=2,
    labels={'motion': np.int32(1)},
    duration=6.0,
    num_frames=150,
    spans=[(2 * i, 2 * i + 2) for i in range(m)],
    fps=25.0,
    clip_length=2.0,
    stride=2.0,
    sampling='multi-clip',
  )
  clips = rng.normal(size=(m, d)).astype(np.float32)
  return Embedding(name, clips, **{**fields, **kwargs})


def test_layout_and_round_trip(tmp_path, folder, reader):
  store.write(folder, item())
  base = tmp_path / 'set' / 'multi-clip' / 'train'
  assert folder == base
  assert sorted(os.listdir(base)) == ['a.json', 'a_c.npy', 'a_v.npy']
  meta = json.loads((base / 'a.json').read_text())
  assert meta == {
    'annotation': 2,
    'labels': {'motion': 1},
    'duration': 6.0,
    'num_frames': 150,
    'clips': [[0, 2], [2, 4], [4, 6]],
    'fps': 25.0,
    'clip_length': 2.0,
    'stride': 2.0,
    'sampling': 'multi-clip',
  }
  clips, video = np.load(base / 'a_c.npy'), np.load(base / 'a_v.npy')
  assert clips.dtype == video.dtype == np.float32
  assert (clips.shape, video.shape) == ((3, 4), (4,))
  got = reader[0]
  np.testing.assert_array_equal(got.clips, item().clips)
  np.testing.assert_allclose(got.video, item().clips.mean(0), rtol=1e-6)
  for name in ('id', 'annotation', 'labels', 'duration', 'num_frames', 'fps'):
    assert getattr(got, name) == getattr(item(), name)
  assert got.spans == [(0.0, 2.0), (2.0, 4.0), (4.0, 6.0)]


def test_without_the_sampling_level(tmp_path):
  assert store.split_folder(tmp_path, 'x', 'val') == tmp_path / 'x' / 'val'


def test_sorts_ids_and_ignores_other_files(folder, reader):
  for name in ('b', 'c', 'a', 'a_c'):
    store.write(folder, item(name))
  (folder / 'notes.txt').write_text('hello')
  (folder / 'z_c.npy').write_bytes(b'a video without its json is none')
  assert reader.ids == ('a', 'a_c', 'b', 'c')
  assert [e.id for e in reader] == list(reader.ids)
  assert len(reader) == 4


def test_features(folder, reader):
  store.write(folder, item('a', m=3))
  store.write(folder, item('bb', m=1, annotation=0, labels={'motion': 5}))
  video, clip = reader.features(), reader.features('clip', label='motion')
  assert video.x.shape == (2, 4)
  np.testing.assert_array_equal(video.y, [2, 0])
  assert clip.x.shape == (4, 4)
  np.testing.assert_array_equal(clip.video, [0, 0, 0, 1])
  np.testing.assert_array_equal(clip.y, [1, 5])
  with pytest.raises(StoreError, match=r"a.json: no label 'scene'.*motion"):
    reader.features(label='scene')


def test_reads_a_foreign_store(folder, reader):
  folder.mkdir(parents=True)
  np.save(folder / 'x_c.npy', np.ones((2, 3), np.float64))
  np.save(folder / 'x_v.npy', np.ones((1, 3), np.float64))
  (folder / 'x.json').write_text('{"annotation": "7", "duration": 1.5}')
  got = reader[0]
  assert (got.annotation, got.duration, got.fps, got.spans) == (
    7,
    1.5,
    None,
    None,
  )
  assert got.video.shape == (3,)
  assert got.clips.dtype == got.video.dtype == np.float32


def test_an_interrupted_write_is_no_video(folder, reader, monkeypatch):
  store.write(folder, item())
  save = np.save

  def fail(f, x):
    if x.ndim == 1:
      raise OSError('disk full')
    save(f, x)

  monkeypatch.setattr(np, 'save', fail)
  with pytest.raises(OSError, match='disk full'):
    store.write(folder, item(annotation=1))
  monkeypatch.undo()
  assert not list(folder.glob('.*'))
  with pytest.raises(StoreError, match=r'no <id>\.json'):
    len(reader)


@pytest.mark.parametrize(
  ('change', 'match'),
  [
    (lambda f: np.save(f / 'a_c.npy', np.ones((0, 4))), r'a_c.npy.*\(0, 4\)'),
    (lambda f: np.save(f / 'a_c.npy', np.ones(4)), r'a_c.npy.*\(4,\)'),
    (lambda f: np.save(f / 'a_v.npy', np.ones((2, 4))), r'a_v.npy.*\(2, 4\)'),
    (lambda f: np.save(f / 'a_v.npy', np.ones(5)), r'a_v.npy: 5 features'),
    (lambda f: np.save(f / 'a_c.npy', np.full((1, 4), np.nan)), 'a_c.npy: NaN'),
    (lambda f: np.save(f / 'a_c.npy', np.ones((1, 4), int)), 'a_c.npy.*int64'),
    (lambda f: (f / 'a_c.npy').write_bytes(b'junk'), 'a_c.npy: unreadable'),
    (lambda f: (f / 'a_c.npy').write_bytes(b''), 'a_c.npy: unreadable'),
    (lambda f: (f / 'a_v.npy').unlink(), 'a_v.npy: unreadable'),
    (lambda f: (f / 'a.json').write_text('{'), 'a.json: unreadable'),
    (lambda f: (f / 'a.json').write_bytes(b'\xff\xfe\x00'), 'a.json: unread'),
    (lambda f: (f / 'a.json').write_text('[]'), 'a.json: expected a json obj'),
    (lambda f: (f / 'a.json').write_text('{"annotation": -1}'), 'a.json.*-1'),
    (lambda f: (f / 'a.json').write_text('{"annotation": 9}'), r'\[0, 9\).* 9'),
    (lambda f: (f / 'a.json').write_text('{"annotation": "x"}'), "a.json.*'x'"),
    (lambda f: (f / 'a.json').write_text('{"labels": [1]}'), 'a.json: labels'),
    (lambda f: (f / 'a.json').write_text('{"labels": {"m": 1.5}}'), r'm is no'),
    (lambda f: (f / 'a.json').write_text('{"clips": [1]}'), 'json: clips must'),
  ],
)
def test_refuses_and_names_the_file(tmp_path, folder, change, match):
  store.write(folder, item())
  change(folder)
  strict = EmbeddingStore(
    str(tmp_path), 'set', 'train', 'multi-clip', num_classes=9
  )
  with pytest.raises(StoreError, match=match):
    strict.read('a')


@pytest.mark.parametrize(
  ('bad', 'match'),
  [
    (dict(name='a/b'), 'no file name'),
    (dict(name=''), 'no file name'),
    (dict(name='.a'), 'no file name'),
    (dict(m=0, spans=None), 'a_c.npy: expected'),
    (dict(video=np.ones((1, 4))), 'a_v.npy: expected'),
    (dict(video=np.full(4, np.inf)), 'a_v.npy: NaN or infinity'),
    (dict(spans=[(0, 1)]), '1 spans for 3 clips'),
  ],
)
def test_writer_refuses(folder, bad, match):
  with pytest.raises(StoreError, match=match):
    store.write(folder, item(**bad))
  assert not folder.exists()


def test_empty_or_missing_folder(folder, reader):
  with pytest.raises(StoreError, match='no such folder'):
    len(reader)
  folder.mkdir(parents=True)
  with pytest.raises(StoreError, match=r'no <id>\.json'):
    len(reader)


def test_widths_must_agree(folder, reader):
  store.write(folder, item('a'))
  store.write(folder, item('b', d=5))
  with pytest.raises(StoreError, match=r'b_c.npy: 5 features'):
    reader.features()


def test_file_id_is_reversible_and_a_file_name(folder):
  ids = ['run/a.mp4', 'a.mp4', 'a%2Fb', '.hidden', 'back\\slash', '100%']
  names = [store.file_id(i) for i in ids]
  assert names[0] == 'run%2Fa.mp4'
  assert names[1] == ids[1]
  assert [urllib.parse.unquote(n) for n in names] == ids
  for name in names:
    store.write(folder, item(name))
