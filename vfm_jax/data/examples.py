"""Turn a position of the run into one example, whatever happens to its file.

This is what worker threads and processes execute. Everything random about an
example comes from (seed, epoch, index), so it does not matter who computes it.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from vfm_jax.data import clips as clips_lib
from vfm_jax.data import sources, video

# Leaf of an example, and of a batch, that carries what went wrong to the main
# process: JSON in uint8, since worker processes send back arrays only.
BAD = '_bad'

# Neighbours to try for one example before giving up on it.
MAX_NEIGHBOURS = 16


def generator(seed: int, epoch: int, index: int) -> np.random.Generator:
  """Return the random generator of one example of one epoch."""
  return np.random.default_rng(np.random.SeedSequence([seed, epoch, index]))


def shuffled(position: int, length: int, seed: int) -> tuple[int, int]:
  """Return (epoch, index): a permutation of the set each epoch, in O(1)."""
  from grain import experimental

  epoch, place = divmod(position, length)
  # Few rounds of the cipher leave visible order in small sets.
  index = experimental.index_shuffle(
    place, max_index=length - 1, seed=_epoch_key(seed, epoch), rounds=8
  )
  return epoch, int(index)


def place(loader: Any, local: int) -> tuple[int, int]:
  """Return where a local position of this process is.

  Args:
    loader: has `batch_size` of the global batch, `local_size` of this process's
      part of it and `first_row`, where that begins.
    local: number of the example among those of this process.

  Returns:
    Row in the global batch, and position in the whole run or pass.
  """
  step, row = divmod(local, loader.local_size)
  row += loader.first_row
  return row, step * loader.batch_size + row


@functools.lru_cache(4)
def _epoch_key(seed: int, epoch: int) -> int:
  return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


@dataclasses.dataclass(frozen=True)
class Train:
  """Load the training example at a local position; picklable.

  Attributes:
    source: the videos.
    clip: sampler of frame indices.
    transform: what happens to the frames.
    seed: seed of the order and of all examples.
    batch_size: of the global batch.
    local_size: of this process's part of it.
    first_row: where that part begins.
    path: config path of the pipeline, for messages.
  """

  source: sources.Source
  clip: Callable
  transform: Callable
  seed: int
  batch_size: int
  local_size: int
  first_row: int
  path: str

  def __call__(self, local: int) -> dict[str, Any]:
    """Return the example, or its nearest good neighbour."""
    row, position = place(self, local)
    length = len(self.source)
    epoch, index = shuffled(position, length, self.seed)
    bad = []
    for offset in range(min(MAX_NEIGHBOURS + 1, length)):
      neighbour = (index + offset) % length
      try:
        # A replacement keeps the numbers of the example it stands for:
        # it is then not a copy of the neighbour's own clip.
        frames, labels = load(
          self, neighbour, generator(self.seed, epoch, index)
        )
      except video.BadVideo as e:
        bad.append([e.name, e.reason])
        continue
      return {
        'video': frames,
        'labels': labels,
        'index': np.int32(neighbour),
        'row': np.int32(row),
        BAD: bad,
      }
    raise RuntimeError(
      f'{self.path}.source: no usable video among {len(bad)} in a row: '
      + '; '.join(f'{n}: {r}' for n, r in bad[:5])
    )


def load(
  loader: Train, index: int, rng: np.random.Generator
) -> tuple[np.ndarray, dict[str, np.int32]]:
  """Decode one clip: (uint8 [T, H, W, 3], labels)."""
  example = loader.source[index]
  with example.open() as reader:
    indices = loader.clip(reader.num_frames, reader.fps, rng)
    if not isinstance(indices, np.ndarray) or indices.ndim != 1:
      raise TypeError(
        f'{loader.path}.clip: training takes one clip, indices [T]; '
        f'{getattr(loader.clip, "__name__", loader.clip)} gives several'
      )
    frames = loader.transform(reader.read(indices), rng)
  if frames.ndim != 4:
    raise TypeError(
      f'{loader.path}.transform: training takes frames [T, H, W, 3], got '
      f'{list(frames.shape)}'
    )
  return frames, {k: np.int32(v) for k, v in example.labels.items()}


@dataclasses.dataclass(frozen=True)
class Eval:
  """Load view number `local` of an evaluation pass; picklable.

  View v of a video is crop v % S of its clip v // S, for S crops a clip. An
  undecodable video is not replaced: its views come out blank and invalid.

  Attributes:
    shape: of one view, (T, H, W, 3).
    views: views a video.
    label_names: names of the labels of blank examples.
    The others are those of `Train`.
  """

  source: sources.Source
  clip: Callable
  transform: Callable
  seed: int
  batch_size: int
  local_size: int
  first_row: int
  path: str
  shape: tuple[int, ...]
  views: int
  label_names: tuple[str, ...]

  def __call__(self, local: int) -> dict[str, Any]:
    """Return the view, blank past the end of the set."""
    row, position = place(self, local)
    index, view = divmod(position, self.views)
    inside = index < len(self.source)
    frames, labels, bad = None, {}, []
    if inside:
      try:
        frames, labels = self._view(index, view)
      except video.BadVideo as e:
        bad.append([e.name, e.reason])
    valid = frames is not None
    return {
      'video': frames if valid else np.zeros(self.shape, np.uint8),
      'labels': {
        k: np.int32(labels[k] if valid else 0) for k in self.label_names
      },
      'index': np.int32(index if inside else -1),
      'view': np.int32(view),
      'row': np.int32(row),
      'valid': np.bool_(valid),
      # Padding is no example: it must not thin out the rate.
      BAD: bad if inside else None,
    }

  def _view(self, index, view):
    rng = generator(self.seed, 0, index)
    example = self.source[index]
    with example.open() as reader:
      indices = clips_lib.as_clips(
        self.clip(reader.num_frames, reader.fps, rng), reader.fps
      ).indices
      crops, rest = divmod(self.views, len(indices))
      if rest:
        raise ValueError(
          f'{self.path}.views: {self.views} views are no multiple of the '
          f'{len(indices)} clips that {self.path}.clip takes of {example.id}'
        )
      frames = self.transform(reader.read(indices[view // crops]), rng)
    found = len(frames) if frames.ndim == 5 else 1
    if found != crops:
      raise ValueError(
        f'{self.path}.views: {self.views} views over {len(indices)} clips '
        f'need {crops} crops a clip; {self.path}.transform gives {found}'
      )
    return (frames[view % crops] if frames.ndim == 5 else frames), (
      example.labels
    )


def stack_clips(examples: list[dict[str, Any]], path: str) -> dict[str, Any]:
  """Stack examples of clips into a batch.

  Raises:
    ValueError: the clips differ in shape.
  """
  shapes = {e['video'].shape for e in examples}
  if len(shapes) > 1:
    raise ValueError(
      f'{path}.transform: the clips of a batch must have one shape, got '
      f'{sorted(shapes)}; crop or resize to a fixed size'
    )
  return stack(examples)


def stack(examples: list[dict[str, Any]]) -> dict[str, Any]:
  """Stack examples into a batch, with the reports of all bad videos."""
  batch: dict[str, Any] = {
    key: np.stack([e[key] for e in examples])
    for key in examples[0]
    if key not in ('labels', BAD)
  }
  batch['labels'] = {
    k: np.stack([e['labels'][k] for e in examples])
    for k in examples[0]['labels']
  }
  reports = [e[BAD] for e in examples]
  batch[BAD] = np.frombuffer(json.dumps(reports).encode(), np.uint8)
  return batch
