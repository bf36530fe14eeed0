import dataclasses
import json
import pickle
import shutil

import numpy as np
import pytest

from vfm_jax.data import latents, shards
from vfm_jax.data.latent_pipeline import LatentPipeline

ABOUT = latents.About(
  shape=(2, 3, 4),
  dtype='float32',
  flips=True,
  scaling=0.5,
  shift=1.0,
  vae_sha256='ab' * 32,
  label_names=('label',),
)
COUNT = 7


def moments(about=ABOUT):
  rng = np.random.default_rng(0)
  out = rng.standard_normal((COUNT, *about.record_shape), np.float32)
  out[:, :, 1] = np.abs(out[:, :, 1])
  return out


def write(out, about=ABOUT, num_shards=1):
  with latents.LatentWriter(out, about, num_shards) as writer:
    for i, x in enumerate(moments(about)):
      writer.write(f'e{i}', {'label': i % 3}, x)
    return writer.finish([{'id': 'bad', 'reason': 'why'}])


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  out = tmp_path_factory.mktemp('latents') / 'two'
  write(out, num_shards=2)
  return out


@pytest.fixture
def copy(written, tmp_path):
  shutil.copytree(written, tmp_path / 'set')
  return tmp_path / 'set'


def edit(copy, **kw):
  file = copy / shards.MANIFEST
  file.write_text(json.dumps({**json.loads(file.read_text()), **kw}))


def take(batches, count):
  with batches:
    return [next(batches) for _ in range(count)]


def equal(a, b):
  assert a.keys() == b.keys()
  for key in a:
    if key != 'labels':
      np.testing.assert_array_equal(a[key], b[key])
  np.testing.assert_array_equal(a['labels']['label'], b['labels']['label'])


def test_round_trip(written):
  source = latents.Latents(str(written))
  assert source.about == ABOUT
  assert len(source) == COUNT
  for i, want in enumerate(moments()):
    name, labels, found = source[i]
    assert (name, labels) == (f'e{i}', {'label': i % 3})
    np.testing.assert_array_equal(found, want)
  with pytest.raises(IndexError):
    source[COUNT]
  manifest = json.loads((written / shards.MANIFEST).read_text())
  assert manifest['skipped'] == [{'id': 'bad', 'reason': 'why'}]
  for shard in manifest['shards']:
    assert shard['sha256'] == shards.sha256(written / shard['file'])


def test_half_precision(tmp_path):
  about = dataclasses.replace(ABOUT, dtype='float16')
  write(tmp_path / 'half', about)
  found = latents.Latents(str(tmp_path / 'half'))[3][2]
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, moments()[3], rtol=5e-4, atol=1e-7)


def test_batches_do_not_depend_on_shards(written, tmp_path):
  for number in (1, 3):
    write(tmp_path / str(number), num_shards=number)
  roots = (written, tmp_path / '1', tmp_path / '3')
  runs = [
    take(LatentPipeline(latents.Latents(str(root))).train_batches(4, seed=1), 5)
    for root in roots
  ]
  for other in runs[1:]:
    for a, b in zip(runs[0], other, strict=True):
      equal(a, b)


def test_training_batches(written):
  pipeline = LatentPipeline(latents.Latents(str(written)))
  assert pipeline.num_examples == COUNT
  batches = take(pipeline.train_batches(4, seed=1), 14)
  spec = pipeline.element_spec(4)
  assert batches[0].keys() == spec.keys()
  for key in ('latent', 'index', 'row'):
    assert batches[0][key].shape == spec[key].shape
    assert batches[0][key].dtype == spec[key].dtype
  # Each epoch visits each example once, and draws it anew.
  index = np.concatenate([b['index'] for b in batches]).reshape(8, COUNT)
  assert (np.sort(index) == np.arange(COUNT)).all()
  assert len(np.unique(index, axis=0)) > 1
  x = np.concatenate([b['latent'] for b in batches])
  assert len(np.unique(x.reshape(len(x), -1), axis=0)) == len(x)
  labels = np.concatenate([b['labels']['label'] for b in batches])
  np.testing.assert_array_equal(labels, index.ravel() % 3)
  # A resumed run and two processes see the same.
  equal(take(pipeline.train_batches(4, seed=1, start_step=9), 1)[0], batches[9])
  parts = [
    take(
      pipeline.train_batches(
        4, seed=1, start_step=9, process_index=i, process_count=2
      ),
      1,
    )[0]
    for i in range(2)
  ]
  for key in ('latent', 'index', 'row'):
    whole = np.concatenate([p[key] for p in parts])
    np.testing.assert_array_equal(whole, batches[9][key])


def test_means_and_mirror_images(written):
  source = latents.Latents(str(written))
  pipeline = LatentPipeline(source, sample=False)
  means = (moments()[:, :, 0] - 1.0) * 0.5
  flipped = []
  for batch in take(pipeline.train_batches(7, seed=0), 8):
    for i, x in zip(batch['index'], batch['latent'], strict=True):
      side = [np.array_equal(x, m) for m in means[i]]
      assert sum(side) == 1
      flipped.append(side[1])
  assert 0.2 < np.mean(flipped) < 0.8
  straight = LatentPipeline(source, sample=False, flip=False)
  batch = take(straight.train_batches(7, seed=0), 1)[0]
  np.testing.assert_array_equal(batch['latent'], means[batch['index'], 0])


def test_draws_have_the_moments(written):
  source = latents.Latents(str(written))
  pipeline = LatentPipeline(source, flip=False)
  batches = take(pipeline.train_batches(7, seed=0), 12)
  x = np.stack([b['latent'][np.argsort(b['index'])] for b in batches])
  mean, std = moments()[:, 0].swapaxes(0, 1)
  eps = (x / 0.5 + 1 - mean) / std
  assert abs(eps.mean()) < 4 / np.sqrt(eps.size)
  np.testing.assert_allclose(eps.std(), 1, atol=4 / np.sqrt(2 * eps.size))


def test_evaluation_batches(written):
  pipeline = LatentPipeline(latents.Latents(str(written)))
  with pipeline.eval_batches(4) as batches:
    first, last = list(batches)
  np.testing.assert_array_equal(first['index'], [0, 1, 2, 3])
  np.testing.assert_array_equal(last['index'], [4, 5, 6, -1])
  np.testing.assert_array_equal(last['valid'], [True, True, True, False])
  np.testing.assert_array_equal(last['labels']['label'], [1, 2, 0, 0])
  assert not last['latent'][3].any()
  with pipeline.eval_batches(4) as batches:
    equal(next(batches), first)


def test_workers_get_a_small_checked_source(written):
  pipeline = LatentPipeline(latents.Latents(str(written)))
  pipeline.source.about  # noqa: B018 (opens it)
  assert len(pickle.dumps(pipeline)) < 1000
  assert not pipeline._shared(4, 4, 0, 0)['source'].check_hashes


def test_damaged_sets(copy):
  shard = copy / 'latents-00001-of-00002.array_record'
  data = shard.read_bytes()
  changed = bytearray(data)
  changed[len(data) // 2] ^= 1
  shard.write_bytes(changed)
  match = (
    r'00001-of-00002.* differs from the SHA-256 .*: expected \w{64}, found'
  )
  pipeline = LatentPipeline(latents.Latents(str(copy)))
  with pytest.raises(ValueError, match=match):
    pipeline.element_spec(4)
  with pytest.raises(ValueError, match=match):
    pipeline.train_batches(4, seed=0)
  shard.write_bytes(data[:-1])
  match = rf'00002.* has {len(data) - 1} bytes, the manifest says {len(data)}'
  with pytest.raises(ValueError, match=match):
    pipeline.eval_batches(4)
  shard.unlink()
  with pytest.raises(ValueError, match=r'shard is missing: .*00001-of-00002'):
    len(pipeline.source)


def test_foreign_sets(copy, tmp_path):
  source = latents.Latents(str(copy))
  edit(copy, format='vfm_jax.videos')
  with pytest.raises(
    ValueError, match=r"\('vfm_jax.videos', 1\), expected \('vfm_jax.latents'"
  ):
    len(source)
  edit(copy, format='vfm_jax.latents', shape=[2, 3, 5])
  with pytest.raises(ValueError, match=r'expected \(2, 2, 2, 3, 5\) numbers'):
    source[0]
  with pytest.raises(ValueError, match=r'with python -m vfm_jax\.main'):
    len(latents.Latents(str(tmp_path)))


def test_wrong_use(written, tmp_path):
  pipeline = LatentPipeline(latents.Latents(str(written)))
  with pytest.raises(ValueError, match=r'the 7 latents of data\.train'):
    pipeline.train_batches(8, seed=0)
  with pytest.raises(ValueError, match='divide by the 3 processes'):
    pipeline.train_batches(4, seed=0, process_count=3)
  about = dataclasses.replace(ABOUT, flips=False)
  write(tmp_path / 'a', about)
  bare = LatentPipeline(latents.Latents(str(tmp_path / 'a')))
  with pytest.raises(ValueError, match=r'data\.train\.flip: .* --noflips'):
    bare.train_batches(4, seed=0)
  take(dataclasses.replace(bare, flip=False).train_batches(4, seed=0), 1)


def test_writer_refuses(tmp_path):
  about = dataclasses.replace(ABOUT, dtype='float16')
  big = np.full(about.record_shape, 1e6, np.float32)
  for x, text in (
    (big, r'not finite in float16, the largest is 1e\+06'),
    (big[:1], r'expected moments \(2, 2, 2, 3, 4\) of e0'),
  ):
    with (
      pytest.raises(ValueError, match=text),
      latents.LatentWriter(tmp_path / 'set', about) as writer,
    ):
      writer.write('e0', {'label': 0}, x)
    assert not list(tmp_path.iterdir())
  with pytest.raises(ValueError, match='8 shards are too many for 7'):
    write(tmp_path / 'set', num_shards=8)
  with pytest.raises(ValueError, match='at least 1, found 0'):
    write(tmp_path / 'set', num_shards=0)
  write(tmp_path / 'set')
  with pytest.raises(FileExistsError, match='set exists already'):
    write(tmp_path / 'set')
