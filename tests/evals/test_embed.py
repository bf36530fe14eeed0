"""Check embedding in memory and into a store, with a toy objective."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax import sharding
from vfm_jax.data import augment, clips
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.data.synthetic import MovingShapes
from vfm_jax.evals.embed import embed, write_embeddings
from vfm_jax.evals.store import EmbeddingStore, StoreError


@dataclasses.dataclass(frozen=True)
class MeanColour:
  """Embed a clip as its mean colour, times a parameter."""

  def embed(self, params, batch):
    video = batch['video'].astype(jnp.float32) / 255
    return params['scale'] * video.mean((1, 2, 3))


PARAMS = {'scale': np.float32(2)}


def batches(n=10, size=4, views=1):
  """Yield padded batches of random clips, `views` adjacent ones a video."""
  rng = np.random.default_rng(0)
  video = rng.integers(0, 255, (n, 2, 4, 4, 3), dtype=np.uint8)
  for start in range(0, n, size):
    at = np.arange(start, start + size)
    inside = at < n
    yield {
      'video': np.where(
        inside[:, None, None, None, None], video[at % n], 0
      ).astype(np.uint8),
      'labels': {'scene': np.where(inside, at // views, 0).astype(np.int32)},
      'index': np.where(inside, at // views, -1).astype(np.int32),
      'view': (at % views).astype(np.int32),
      'row': (at - start).astype(np.int32),
      'valid': inside,
    }


def keep(transform_size=16):
  return functools.partial(_same, size=transform_size)


def _same(frames, rng, size):
  del rng
  return frames[:, :size, :size]


def pipeline(count=7, frames=32, clip=None, **kwargs):
  return Pipeline(
    source=MovingShapes(count=count, frames=frames, size=16, fps=8.0),
    clip=clip or functools.partial(clips.uniform, frames=4),
    transform=keep(),
    **kwargs,
  )


def test_keeps_valid_rows_in_order():
  got = embed(MeanColour(), PARAMS, batches())
  video = np.concatenate([b['video'][b['valid']] for b in batches()])
  assert got.x.dtype == np.float32
  np.testing.assert_allclose(got.x, 2 * video.mean((1, 2, 3)) / 255, rtol=1e-5)
  np.testing.assert_array_equal(got.index, np.arange(10))
  np.testing.assert_array_equal(got.features('scene').y, np.arange(10))


def test_order_of_the_batches_does_not_matter():
  want = embed(MeanColour(), PARAMS, batches())
  got = embed(MeanColour(), PARAMS, reversed(list(batches())))
  for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
    np.testing.assert_array_equal(a, b)


def test_views_of_a_video_become_its_rows():
  got = embed(MeanColour(), PARAMS, batches(views=2)).features('scene')
  assert got.x.shape == (10, 3)
  np.testing.assert_array_equal(got.video, np.repeat(np.arange(5), 2))
  np.testing.assert_array_equal(got.y, np.arange(5))


def test_over_a_mesh_gives_the_same():
  mesh = sharding.make_mesh(sharding.Mesh())
  got = embed(MeanColour(), PARAMS, batches(size=8), mesh=mesh)
  want = embed(MeanColour(), PARAMS, batches(size=8))
  np.testing.assert_allclose(got.x, want.x, rtol=1e-6)
  np.testing.assert_array_equal(got.labels['scene'], want.labels['scene'])


def test_compiles_once_for_all_calls():
  count = []

  @dataclasses.dataclass(frozen=True)
  class Counted(MeanColour):
    table: tuple = ()

    def embed(self, params, batch):
      count.append(1)
      return super().embed(params, batch)

  objective = Counted(table=[1])  # unhashable: identity is what counts
  for scale in (1.0, 3.0):
    embed(objective, {'scale': np.float32(scale)}, batches())
  assert len(count) == 1


def test_errors():
  with pytest.raises(TypeError, match='object has no embed'):
    embed(object(), {}, batches())
  with pytest.raises(ValueError, match='no batches'):
    embed(MeanColour(), PARAMS, [])
  blank = [{**b, 'valid': np.zeros(4, bool)} for b in batches()]
  with pytest.raises(ValueError, match='no valid clip'):
    embed(MeanColour(), PARAMS, blank)
  with pytest.raises(ValueError, match='10 of 10 embeddings are not finite'):
    embed(MeanColour(), {'scale': np.float32(np.nan)}, batches())
  with pytest.raises(ValueError, match=r"no label 'x'.*scene"):
    embed(MeanColour(), PARAMS, batches()).features('x')


def test_writes_uniform_embeddings(tmp_path):
  n = write_embeddings(
    MeanColour(), PARAMS, pipeline(), tmp_path, 'shapes', 'train',
    annotation='shape', batch_size=4,
  )  # fmt: skip
  reader = EmbeddingStore(str(tmp_path), 'shapes', 'train', 'uniform')
  assert n == len(reader) == 7
  first = reader.read('shapes%2F0%2F5')
  assert first.annotation == 1
  assert first.labels == {'shape': 1, 'direction': 1}
  assert (first.duration, first.num_frames, first.fps) == (4.0, 32, 8.0)
  assert (first.clips.shape, first.sampling) == ((1, 3), 'uniform')
  assert first.spans == [(0.0, 4.0)]
  np.testing.assert_array_equal(first.clips[0], first.video)
  memory = embed(MeanColour(), PARAMS, pipeline().eval_batches(4))
  np.testing.assert_allclose(first.video, memory.x[5], rtol=1e-6)


def test_writes_multi_clip_embeddings_whatever_the_batch(tmp_path):
  clip = functools.partial(clips.multi_clip, frames=4, window=1.0)
  for name, batch_size in (('a', 3), ('b', 32)):
    write_embeddings(
      MeanColour(), PARAMS, pipeline(count=3, clip=clip), tmp_path, name,
      'val', sampling='multi-clip', batch_size=batch_size,
    )  # fmt: skip
  a, b = (
    EmbeddingStore(str(tmp_path), name, 'val', 'multi-clip') for name in 'ab'
  )
  for x, y in zip(a, b, strict=True):
    assert x.clips.shape == (4, 3)
    np.testing.assert_allclose(x.clips, y.clips, rtol=1e-6)
    np.testing.assert_allclose(x.video, x.clips.mean(0), rtol=1e-6)
    assert x.spans == [(i, i + 1) for i in range(4)]
    assert (x.annotation, x.clip_length, x.stride) == (None, 1.0, 1.0)


def test_write_errors(tmp_path):
  write = functools.partial(
    write_embeddings, MeanColour(), PARAMS, root=tmp_path, dataset='x',
    split='val',
  )  # fmt: skip
  with pytest.raises(ValueError, match=r"no label 'scene'.*direction"):
    write(pipeline(), annotation='scene')
  clip = functools.partial(clips.multi_clip, frames=4, window=1.0)
  with pytest.raises(ValueError, match=r'one clip of one crop.*\[4, 4, 16'):
    write(pipeline(clip=clip))
  crops = dataclasses.replace(
    pipeline(), transform=functools.partial(augment.three_crops, size=8)
  )
  with pytest.raises(ValueError, match=r'data\.train\.clip or \.transform'):
    write(crops, sampling='multi-clip')


@dataclasses.dataclass(frozen=True)
class Files:
  """Give moving shapes the names of files."""

  names: tuple[str, ...]
  label_names = ()

  def __len__(self):
    return len(self.names)

  def __getitem__(self, i):
    shapes = MovingShapes(count=len(self), frames=8, size=16, fps=8.0)
    return dataclasses.replace(shapes[i], id=self.names[i], labels={})


def test_files_go_by_the_name_that_annotations_have(tmp_path):
  write = functools.partial(
    write_embeddings, MeanColour(), PARAMS, root=tmp_path, dataset='x',
    split='val',
  )  # fmt: skip
  source = Files(('deep/video_1.mp4', 'v2.x', 'v3.AVI'))
  write(dataclasses.replace(pipeline(), source=source))
  reader = EmbeddingStore(str(tmp_path), 'x', 'val', 'uniform')
  assert reader.ids == ('deep%2Fvideo_1', 'v2.x', 'v3')
  twice = dataclasses.replace(pipeline(), source=Files(('a.mp4', 'a.mkv')))
  with pytest.raises(StoreError, match=r'a\.mp4 and a\.mkv would both be a '):
    write(twice)
