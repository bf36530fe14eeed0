import dataclasses
import functools
import gc
import itertools
import logging
import pickle
import pkgutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import vfm_jax.data as data_package
from vfm_jax.data import (
  augment,
  clips,
  examples,
  folder,
  pipeline,
  synthetic,
  video,
)

CLIP = functools.partial(clips.videomae_pretrain, frames=4, stride=2)
CROP = functools.partial(augment.multi_scale_crop, size=16)
SHAPES = pipeline.Pipeline(
  synthetic.MovingShapes(count=22, frames=12, size=24), CLIP, CROP
)


@pytest.fixture
def videos(video_folder):
  """Six decoded videos; batches of 6 in total."""
  return pipeline.Pipeline(
    folder.FolderCSV(
      str(video_folder), str(video_folder / 'all.csv'), ('label', 'motion')
    ),
    CLIP,
    CROP,
  )


def take(data, count, batch_size=6, **kw):
  with data.train_batches(batch_size, **{'seed': 3, **kw}) as batches:
    return [next(batches) for _ in range(count)]


def assert_equal(a, b):
  assert a.keys() == b.keys()
  for key in a:
    if key == 'labels':
      assert_equal(a[key], b[key])
    else:
      np.testing.assert_array_equal(a[key], b[key])


def test_batches_have_the_spec():
  (batch,) = take(SHAPES, 1)
  spec = SHAPES.element_spec(6)
  assert batch.keys() == spec.keys() == {'video', 'labels', 'index', 'row'}
  assert batch['labels'].keys() == spec['labels'].keys()
  for key in ('video', 'index', 'row'):
    assert pipeline.ArraySpec(batch[key].shape, batch[key].dtype) == spec[key]
  for key, value in batch['labels'].items():
    assert pipeline.ArraySpec(value.shape, value.dtype) == spec['labels'][key]
  np.testing.assert_array_equal(batch['row'], np.arange(6))
  assert 'uint8[6, 4, 16, 16, 3]' in repr(spec['video'])


def test_spec_needs_no_data():
  source = folder.FolderCSV('/nowhere', '/nowhere.csv')
  spec = pipeline.Pipeline(source, CLIP, CROP).element_spec(2)
  assert spec['video'].shape == (2, 4, 16, 16, 3)


def test_spec_of_the_size_of_the_videos(videos):
  whole = dataclasses.replace(videos, transform=augment.identity)
  assert whole.element_spec(2)['video'].shape == (2, 4, 48, 64, 3)


def test_epochs_are_permutations():
  batches = take(SHAPES, 11, batch_size=4)
  seen = np.concatenate([b['index'] for b in batches])
  first, second = seen[:22], seen[22:]
  assert sorted(first) == sorted(second) == list(range(22))
  assert (first != second).any()
  assert (first != np.arange(22)).any()
  other = take(SHAPES, 1, batch_size=4, seed=4)[0]['index']
  assert (other != seen[:4]).any()


def test_epochs_draw_new_clips():
  one = dataclasses.replace(
    SHAPES, source=synthetic.MovingShapes(count=1, frames=12, size=24)
  )
  a, b = take(one, 2, batch_size=1)
  assert (a['video'] != b['video']).any()


def test_labels_go_with_the_video():
  for batch in take(SHAPES, 3):
    for k, index in enumerate(batch['index']):
      labels = SHAPES.source[int(index)].labels
      assert {n: v[k] for n, v in batch['labels'].items()} == labels


def test_the_random_numbers_are_those_of_seed_epoch_index(videos):
  (batch,) = take(videos, 1)
  for k, index in enumerate(batch['index']):
    rng = np.random.default_rng(np.random.SeedSequence([3, 0, int(index)]))
    with videos.source[int(index)].open() as reader:
      indices = CLIP(reader.num_frames, reader.fps, rng)
      expected = CROP(reader.read(indices), rng)
    np.testing.assert_array_equal(batch['video'][k], expected)


@pytest.mark.parametrize('start_step', [1, 5])
def test_a_run_goes_on_where_it_stopped(videos, start_step):
  straight = take(videos, start_step + 2)
  resumed = take(videos, 2, start_step=start_step)
  for a, b in zip(straight[start_step:], resumed, strict=True):
    assert_equal(a, b)


@pytest.mark.parametrize(
  ('workers', 'start_step'),
  [
    (2, 3),
    # A process each.
    pytest.param(1, 0, marks=pytest.mark.slow),
    pytest.param(4, 3, marks=pytest.mark.slow),
  ],
)
def test_workers_change_nothing(videos, workers, start_step):
  alone = take(videos, 6, batch_size=2, start_step=start_step)
  shared = take(videos, 6, batch_size=2, start_step=start_step, workers=workers)
  for a, b in zip(alone, shared, strict=True):
    assert_equal(a, b)


@pytest.mark.parametrize('threads', [1, 8])
def test_threads_change_nothing(videos, threads):
  other = dataclasses.replace(videos, threads=threads)
  for a, b in zip(take(videos, 3), take(other, 3), strict=True):
    assert_equal(a, b)


@pytest.mark.parametrize('count', [2, 4])
def test_processes_share_the_global_batch(count):
  whole = take(SHAPES, 8, batch_size=8)
  parts = [
    take(SHAPES, 8, batch_size=8, process_index=p, process_count=count)
    for p in range(count)
  ]
  for step, batch in enumerate(whole):
    rows = [part[step] for part in parts]
    for key in ('video', 'index', 'row'):
      joined = np.concatenate([r[key] for r in rows])
      np.testing.assert_array_equal(joined, batch[key])
    for name, value in batch['labels'].items():
      joined = np.concatenate([r['labels'][name] for r in rows])
      np.testing.assert_array_equal(joined, value)


@pytest.mark.parametrize('count', [1, 2])
def test_evaluation_is_in_order_and_padded(count):
  parts = [
    list(SHAPES.eval_batches(8, process_index=p, process_count=count))
    for p in range(count)
  ]
  assert [len(p) for p in parts] == [3] * count
  index, row, valid = (
    np.concatenate(
      [np.concatenate([p[s][key] for p in parts]) for s in range(3)]
    )
    for key in ('index', 'row', 'valid')
  )
  np.testing.assert_array_equal(index, [*range(22), -1, -1])
  np.testing.assert_array_equal(valid, [True] * 22 + [False] * 2)
  np.testing.assert_array_equal(row, [*range(8)] * 3)
  again = next(iter(SHAPES.eval_batches(8)))['video']
  np.testing.assert_array_equal(again[: 8 // count], parts[0][0]['video'])


def test_evaluation_views(videos):
  views = dataclasses.replace(
    videos,
    clip=functools.partial(
      clips.videomae_dense_test, frames=4, stride=2, clips=2
    ),
    transform=functools.partial(augment.three_crops, size=16),
    views=6,
  )
  batches = list(views.eval_batches(12))
  index = np.concatenate([b['index'] for b in batches])
  view = np.concatenate([b['view'] for b in batches])
  np.testing.assert_array_equal(index, np.repeat(np.arange(6), 6))
  np.testing.assert_array_equal(view, np.tile(np.arange(6), 6))
  with videos.source[1].open() as reader:
    rng = np.random.default_rng(0)
    picked = views.clip(reader.num_frames, reader.fps, rng)
    expected = views.transform(reader.read(picked[1]), rng)
  np.testing.assert_array_equal(batches[0]['video'][9:12], expected)


def test_views_must_agree(videos):
  with pytest.raises(ValueError, match='views: 3 views over 1 clips need 3'):
    list(dataclasses.replace(videos, views=3).eval_batches(2))
  two = functools.partial(clips.segment_test, frames=4)
  with pytest.raises(ValueError, match='views: 3 views are no multiple of th'):
    list(dataclasses.replace(videos, views=3, clip=two).eval_batches(2))


def test_iterate_videos(videos):
  many = dataclasses.replace(
    videos,
    clip=functools.partial(clips.multi_clip, frames=4, window=0.4),
    transform=functools.partial(augment.center_crop, size=16),
  )
  found = list(many.iterate_videos())
  assert [v.id for v in found] == [f'v{i}.mp4' for i in range(6)]
  # 20, 24, ... 40 frames at 25 a second; windows of .4 s.
  assert [len(v.clips) for v in found] == [2, 2, 2, 3, 3, 4]
  assert found[5].clips.shape == (4, 4, 16, 16, 3)
  np.testing.assert_allclose(found[0].spans, [[0, 0.4], [0.4, 0.8]])
  assert (found[1].duration, found[1].fps) == (24 / 25, 25)
  assert found[4].labels == {'label': 1, 'motion': 0}
  split = [
    v.id
    for p in range(2)
    for v in many.iterate_videos(process_index=p, process_count=2)
  ]
  assert sorted(split) == [v.id for v in found]


def test_clear_errors_before_anything_is_read(videos, tmp_path):
  with pytest.raises(ValueError, match=r'^batch_size: 8 is more than the 6 v'):
    videos.train_batches(8, seed=0)
  with pytest.raises(
    ValueError, match='batch_size: 6 does not divide by the 4'
  ):
    videos.train_batches(6, seed=0, process_count=4)
  empty = dataclasses.replace(
    SHAPES, source=synthetic.MovingShapes(count=0), path='data.val'
  )
  for start in (
    lambda: empty.train_batches(1, seed=0),
    lambda: empty.eval_batches(1),
    lambda: list(empty.iterate_videos()),
  ):
    with pytest.raises(ValueError, match=r'data\.val\.source: holds no videos'):
      start()


def test_clear_errors_of_samplers_and_transforms(videos, bad_folder):
  several = dataclasses.replace(videos, clip=clips.multi_clip)
  with pytest.raises(TypeError, match=r'data\.train\.clip: .* multi_clip give'):
    take(several, 1)
  crops = dataclasses.replace(videos, transform=augment.three_crops)
  with pytest.raises(TypeError, match=r'data\.train\.transform: training take'):
    take(crops, 1)
  csv = bad_folder / 'sizes.csv'
  csv.write_text('path\ngood0.mp4\nodd.mp4\n')
  sizes = dataclasses.replace(
    videos,
    source=folder.FolderCSV(str(bad_folder), str(csv), ()),
    transform=augment.identity,
  )
  with pytest.raises(ValueError, match=r'transform: the clips of a batch must'):
    take(sizes, 1, batch_size=2)


BAD = {
  'truncated.mp4': 'truncated',
  'headless.mp4': 'truncated inside its index',
  'empty.mp4': '0 bytes',
  'no_frames.avi': 'zero frames',
  'audio.mp4': 'audio only',
  'missing.mp4': 'missing',
  'good1.mp4': "bad label 'seven': not an integer",
  'good2.mp4': 'bad label -1: outside 0..2',
  'good3.mp4': 'bad label 9: outside 0..2',
}


@pytest.fixture
def bad_videos(bad_folder):
  """11 usable rows of 20: good ones, one frame, odd size, variable rate."""
  return pipeline.Pipeline(
    folder.FolderCSV(
      str(bad_folder), str(bad_folder / 'all.csv'), num_classes=(3,)
    ),
    CLIP,
    CROP,
    max_bad_rate=0.5,
    bad_grace=20,
  )


@pytest.mark.parametrize('workers', [0, 1])
def test_bad_videos_are_named_counted_and_replaced(bad_videos, workers, caplog):
  with (
    caplog.at_level(logging.WARNING, 'absl'),
    bad_videos.train_batches(5, seed=0, workers=workers) as batches,
  ):
    seen = [next(batches) for _ in range(8)]
    stats = batches.stats
  assert (stats.seen, stats.replaced) == (40, 18)
  assert len(stats.bad) == len(BAD)
  for name, reason in BAD.items():
    (found,) = [n for n in stats.bad if name in n]
    assert reason in stats.bad[found]
    assert sum(f'Unusable video {found}:' in m for m in caplog.messages) == 1
  source = bad_videos.source
  good = [i for i in range(20) if _usable(source, i)]
  assert len(good) == 11
  for step, batch in enumerate(seen):
    for row, index in enumerate(batch['index']):
      position = step * 5 + row
      _, wanted = examples.shuffled(position, 20, 0)
      after = [(wanted + k) % 20 for k in range(20)]
      assert index == next(i for i in after if i in good)
      assert batch['labels']['label'][row] == source[int(index)].labels['label']
  assert set(np.concatenate([b['index'] for b in seen])) == set(good)


def _usable(source, index):
  try:
    source[index].open().close()
  except video.BadVideo:
    return False
  return True


def test_too_many_bad_videos_stop_the_run(bad_videos):
  strict = dataclasses.replace(bad_videos, max_bad_rate=0.2)
  batches = strict.train_batches(5, seed=0)
  with pytest.raises(pipeline.TooManyBadVideos) as e:
    list(itertools.islice(batches, 40))
  assert batches.stats.seen == 20
  message = str(e.value)
  assert '9 of 20 examples had an unusable video (45.0%)' in message
  assert 'data.train.max_bad_rate=0.2' in message
  assert 'empty.mp4: empty: the file has 0 bytes' in message


def test_evaluation_leaves_bad_videos_out(bad_videos):
  batches = bad_videos.eval_batches(8)
  valid = np.concatenate([b['valid'] for b in batches])
  usable = [_usable(bad_videos.source, i) for i in range(20)]
  np.testing.assert_array_equal(valid, [*usable, False, False, False, False])
  assert (batches.stats.seen, batches.stats.replaced) == (20, 9)
  strict = dataclasses.replace(bad_videos, max_bad_rate=0.2, bad_grace=100)
  with pytest.raises(pipeline.TooManyBadVideos, match='9 of 20'):
    list(strict.eval_batches(8))
  assert len(list(bad_videos.iterate_videos())) == 11
  with pytest.raises(pipeline.TooManyBadVideos, match='9 of 20'):
    list(strict.iterate_videos())


def test_nothing_usable_stops_at_once(tmp_path):
  rows = ''.join(f'none{i}.mp4\n' for i in range(30))
  (tmp_path / 'c.csv').write_text('path\n' + rows)
  source = folder.FolderCSV(str(tmp_path), str(tmp_path / 'c.csv'), ())
  data = pipeline.Pipeline(source, CLIP, CROP, max_bad_rate=1.0)
  with pytest.raises(RuntimeError, match='no usable video among 17 in a row'):
    next(data.train_batches(2, seed=0))


def test_one_frame_repeats(bad_folder, tmp_path):
  csv = tmp_path / 'c.csv'
  csv.write_text('path\none_frame.mp4\n')
  source = folder.FolderCSV(str(bad_folder), str(csv), ())
  data = pipeline.Pipeline(
    source, CLIP, functools.partial(augment.center_crop, size=16)
  )
  (batch,) = take(data, 1, batch_size=1)
  assert (batch['video'][0] == batch['video'][0, :1]).all()


def test_waiting_is_measured():
  batches = SHAPES.train_batches(4, seed=0)
  next(batches)
  waited = batches.take_wait_s()
  assert 0 < waited == batches.stats.wait_s
  assert batches.take_wait_s() == 0
  batches.close()
  with pytest.raises(StopIteration):
    next(batches)


def test_pipelines_pickle():
  assert pickle.loads(pickle.dumps(SHAPES)) is not SHAPES


def test_importing_the_data_part_imports_neither_jax_nor_grain():
  modules = [m.name for m in pkgutil.iter_modules(data_package.__path__)]
  code = 'import sys\n' + ''.join(f'import vfm_jax.data.{m}\n' for m in modules)
  code += "print([m for m in ('jax', 'grain', 'av') if m in sys.modules])"
  run = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert run.stdout.strip() == '[]'


def test_closing_stops_the_threads():
  before = threading.active_count()
  for _ in range(3):
    batches = SHAPES.eval_batches(8)
    next(batches)
    batches.close()
    del batches
  gc.collect()
  deadline = time.monotonic() + 5
  while threading.active_count() > before and time.monotonic() < deadline:
    time.sleep(0.05)
  assert threading.active_count() <= before
