"""Turn a source of videos into batches: order, decoding, transforms."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from vfm_jax.data import augment, examples, feed, sources, video, whole
from vfm_jax.data import batches as batches_lib
from vfm_jax.data import clips as clips_lib
from vfm_jax.data.batches import Batches, Stats, TooManyBadVideos
from vfm_jax.data.spec import ArraySpec
from vfm_jax.data.whole import VideoClips

__all__ = [
  'ArraySpec',
  'Batches',
  'Pipeline',
  'Stats',
  'TooManyBadVideos',
  'VideoClips',
]


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """Turn a source of videos into batches of clips.

  A batch is a dict of numpy arrays: `video` uint8 [B, T, H, W, 3], `labels`
  dict of int32 [B], `index` int32 [B] in the source, `row` int32 [B] in the
  global batch; in evaluations also `valid` bool [B] and `view` int32 [B].

  Attributes:
    source: the videos.
    clip: sampler of frame indices, of `vfm_jax.data.clips`.
    transform: what happens to the frames, of `vfm_jax.data.augment`.
    views: examples that a video gives in evaluations: clips times crops.
    max_bad_rate: part of the examples that may be unusable before the run
      stops; each host process counts its own.
    bad_grace: examples to see before that rate counts.
    threads: threads that read ahead where there are no worker processes.
    path: where the pipeline stands in the config, for messages.
  """

  source: sources.Source
  clip: Callable = clips_lib.videomae_pretrain
  transform: Callable = augment.multi_scale_crop
  views: int = 1
  max_bad_rate: float = 0.05
  bad_grace: int = 100
  threads: int = 4
  path: str = 'data.train'

  @property
  def num_examples(self) -> int:
    """Number of videos in the source."""
    return len(self.source)

  def train_batches(
    self,
    batch_size: int,
    *,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
  ) -> Batches:
    """Iterate over training batches without end.

    Each epoch is a permutation of the source. An unusable video is replaced
    by the next usable one in the source, label included.

    Args:
      batch_size: of the global batch.
      seed: seed of the order, the clips and the transforms.
      start_step: step of the first batch.
      process_index: which part of each batch to give.
      process_count: number of parts.
      workers: processes that prepare batches; 0 uses threads of this one.

    Returns:
      An iterator of the local rows of each global batch.

    Raises:
      ValueError: the source is empty or smaller than a batch, or the batch
        does not divide by the processes.
      TooManyBadVideos: while iterating, above `max_bad_rate`.
    """
    local = self._local_size(batch_size, process_count)
    if self.num_examples < batch_size:
      raise ValueError(
        f'batch_size: {batch_size} is more than the {self.num_examples} '
        f'videos of {self.path}.source'
      )
    loader = examples.Train(
      source=self.source,
      clip=self.clip,
      transform=self.transform,
      seed=seed,
      batch_size=batch_size,
      local_size=local,
      first_row=process_index * local,
      path=self.path,
    )
    return self._batches(loader, start_step, None, workers)

  def eval_batches(
    self,
    batch_size: int,
    *,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
  ) -> Batches:
    """Iterate once over all views of all videos, in order.

    The last batch is padded; its padding, and videos that can't be decoded,
    have `valid` False (padding also has `index` -1). Nothing is replaced.

    Args:
      batch_size: of the global batch.
      seed: seed of samplers and transforms that draw.
      process_index: which part of each batch to give.
      process_count: number of parts; all give the same number of batches.
      workers: processes that prepare batches; 0 uses threads of this one.
    """
    local = self._local_size(batch_size, process_count)
    loader = examples.Eval(
      source=self.source,
      clip=self.clip,
      transform=self.transform,
      seed=seed,
      batch_size=batch_size,
      local_size=local,
      first_row=process_index * local,
      path=self.path,
      shape=self._view_shape(),
      views=self.views,
      label_names=tuple(self.source.label_names),
    )
    steps = -(-self.num_examples * self.views // batch_size)
    return self._batches(loader, 0, steps, workers)

  def iterate_videos(
    self, *, seed: int = 0, process_index: int = 0, process_count: int = 1
  ) -> Iterator[VideoClips]:
    """Yield every video with all its clips, in order.

    This is what embeddings of long videos need: the number of clips may
    differ between videos. Process p of P takes the videos p, p + P, ...
    Unusable videos are left out, named in the log and counted against
    `max_bad_rate`.

    Raises:
      TooManyBadVideos: above `max_bad_rate`.
    """
    self._check_source()
    account = Batches(lambda: iter(()), self._limit())
    load = whole.Load(self.source, self.clip, self.transform, seed)
    dataset = feed.import_grain().MapDataset.range(
      process_index, self.num_examples, process_count
    )
    options = feed.read_options(self.threads, 2)
    for item, bad in dataset.map(load).to_iter_dataset(options):
      account.record([bad])
      if item is not None:
        yield item
    account.check()

  def element_spec(self, batch_size: int) -> dict[str, Any]:
    """Return shapes and types of a training batch, as `ArraySpec` leaves.

    Decodes nothing where the transform gives one size for all videos.
    """
    shape = self._view_shape()
    rows = ArraySpec((batch_size,), np.int32)
    return {
      'video': ArraySpec((batch_size, *shape), np.uint8),
      'labels': dict.fromkeys(self.source.label_names, rows),
      'index': rows,
      'row': rows,
    }

  def _view_shape(self) -> tuple[int, ...]:
    """Return (T, H, W, 3) of one clip."""
    shapes = {
      self._shape_of(np.zeros((1, *size, 3), np.uint8))
      for size in ((240, 320), (360, 270))
    }
    if len(shapes) == 1:
      return shapes.pop()
    # The size depends on the video: ask the first usable one.
    self._check_source()
    for index in range(min(self.num_examples, examples.MAX_NEIGHBOURS)):
      try:
        with self.source[index].open() as reader:
          return self._shape_of(reader.read(np.zeros(1, np.int64)))
      except video.BadVideo:
        continue
    raise ValueError(
      f'{self.path}.source: none of the first {examples.MAX_NEIGHBOURS} '
      'videos is usable'
    )

  def _shape_of(self, frame: np.ndarray) -> tuple[int, ...]:
    """Return the shape that the transform makes of a clip of this frame."""
    rng = np.random.default_rng(0)
    indices = clips_lib.as_clips(self.clip(64, 25.0, rng), 25.0).indices
    frames = np.repeat(frame, indices.shape[1], axis=0)
    return self.transform(frames, rng).shape[-4:]

  def _check_source(self) -> None:
    if not self.num_examples:
      raise ValueError(f'{self.path}.source: holds no videos')

  def _local_size(self, batch_size: int, process_count: int) -> int:
    self._check_source()
    return feed.local_size(batch_size, process_count)

  def _limit(self) -> batches_lib.Limit:
    return batches_lib.Limit(self.max_bad_rate, self.bad_grace, self.path)

  def _batches(
    self,
    loader: examples.Train | examples.Eval,
    start_step: int,
    steps: int | None,
    workers: int,
  ) -> Batches:
    return feed.batches(
      loader,
      functools.partial(examples.stack_clips, path=self.path),
      self._limit(),
      start_step=start_step,
      steps=steps,
      workers=workers,
      threads=self.threads,
    )
