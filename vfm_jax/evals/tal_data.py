"""Bring features of long videos and their actions on a grid, and crop them.

Features are the `_c` rows of an embedding store, row k of which covers the
seconds [k * stride, k * stride + clip_length].
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from vfm_jax.evals.store import EmbeddingStore, StoreError
from vfm_jax.evals.tal_annotations import Instance

# Places that `crop` tries for a crop that holds an action.
_TRIALS = 200


class Grid(NamedTuple):
  """Relate seconds to steps of the features.

  Attributes:
    origin: seconds of step 0, the middle of its clip.
    step: seconds from one step to the next.
  """

  origin: float
  step: float

  def to_steps(self, seconds: np.ndarray) -> np.ndarray:
    """Return f32 steps of times in seconds."""
    return np.asarray(
      (np.asarray(seconds, np.float64) - self.origin) / self.step, np.float32
    )

  def to_seconds(self, steps: np.ndarray, duration: float) -> np.ndarray:
    """Return f32 seconds of steps, within [0, duration]."""
    seconds = np.asarray(steps, np.float64) * self.step + self.origin
    return np.clip(seconds, 0.0, duration).astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Video:
  """Hold a video on its grid.

  Attributes:
    features: f32 [T, D].
    segments: f32 [G, 2] start and end of each action in steps.
    labels: int32 [G].
  """

  features: np.ndarray
  segments: np.ndarray
  labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Timing:
  """Say how the rows of a store lie in time, and how long a video may be.

  Attributes:
    clip_length: seconds that a row covers.
    stride: seconds from one row to the next.
    resize: stretch every video to this number of steps, as is done for
      ActivityNet; None keeps the rows.
    max_steps: rows that a video may have where they are kept; None for any.
  """

  clip_length: float = 0.5
  stride: float = 0.125
  resize: int | None = None
  max_steps: int | None = None

  def grid(self, rows: int) -> Grid:
    """Return the grid of a video of so many rows (sheet of the release).

    Kept rows have their middle at k * stride + clip_length / 2. Stretched to
    n steps, each covers an n-th of what all rows cover together.
    """
    if self.resize is None:
      return Grid(self.clip_length / 2, self.stride)
    step = ((rows - 1) * self.stride + self.clip_length) / self.resize
    return Grid(step / 2, step)


@dataclasses.dataclass(frozen=True)
class Item:
  """Name a video of a store with its actions.

  Attributes:
    id: of the video in the annotations.
    file: of the video in the store.
    store: that holds the features.
    actions: of the video.
    timing: how rows lie in time.
    duration: seconds, from the annotations; the store's own goes before.
    cut: leave out of the actions what lies after the last step, as is done
      for the training videos of ActivityNet.
    classless: give all actions class 0.
    cache: keep the features in memory.
  """

  id: str
  file: str
  store: EmbeddingStore
  actions: tuple[Instance, ...]
  timing: Timing
  duration: float | None = None
  cut: bool = False
  classless: bool = False
  cache: bool = True

  @property
  def path(self) -> pathlib.Path:
    """File of the features."""
    return self.store.folder / f'{self.file}_c.npy'

  @property
  def count(self) -> int:
    """Number of actions."""
    return len(self.actions)

  def read(self) -> Video:
    """Return the video on its grid.

    Raises:
      StoreError: a file is missing or wrong, or the video is too long; the
        message names the file.
    """
    return self._loaded[0] if self.cache else self._load()[0]

  def about(self) -> tuple[Grid, float]:
    """Return the grid and the duration in seconds; errors as `read`."""
    return (self._loaded if self.cache else self._load())[1:]

  @functools.cached_property
  def _loaded(self) -> tuple[Video, Grid, float]:
    return self._load()

  def _load(self) -> tuple[Video, Grid, float]:
    item = self.store.read_clips(self.file)
    t = self.timing
    for name in ('clip_length', 'stride'):
      own = getattr(item, name)
      if own is not None and not math.isclose(own, getattr(t, name)):
        raise StoreError(
          f'{self.path.with_name(f"{self.file}.json")}: {name} is {own} s, '
          f'expected {getattr(t, name)}; change timing.{name}'
        )
    rows = len(item.clips)
    if t.resize is None and t.max_steps is not None and rows > t.max_steps:
      raise StoreError(
        f'{self.path}: {rows} rows, the longest video may have {t.max_steps}; '
        'raise timing.max_steps, or stretch videos by timing.resize'
      )
    duration = item.duration if item.duration is not None else self.duration
    if duration is None or not duration > 0:
      raise StoreError(
        f'{self.path.with_name(f"{self.file}.json")}: expected a duration '
        f'above 0 s here or in the annotations, found {duration}'
      )
    grid = t.grid(rows)
    features = item.clips
    if t.resize is not None:
      features = stretch(features, t.resize)
    spans = np.array([a[:2] for a in self.actions], np.float64).reshape(-1, 2)
    segments = grid.to_steps(spans)
    labels = np.array([a.label for a in self.actions], np.int32)
    if self.classless:
      labels = np.zeros_like(labels)
    video = Video(features, segments, labels)
    return (cut(video) if self.cut else video), grid, float(duration)


def stretch(features: np.ndarray, length: int) -> np.ndarray:
  """Interpolate rows [T, D] linearly to `length` rows, f32.

  Step i of n lies at (i + 1/2) / n, as in torch without aligned corners.
  """
  n = len(features)
  if n == length:
    return features
  place = np.maximum((np.arange(length) + 0.5) * (n / length) - 0.5, 0)
  low = np.minimum(np.floor(place).astype(int), n - 1)
  high = np.minimum(low + 1, n - 1)
  part = (place - low).astype(np.float32)[:, None]
  return features[low] * (1 - part) + features[high] * part


def cut(video: Video, *, keep: float = 0.5) -> Video:
  """Cut actions at the end of the features, half a step after the last.

  What starts after it, or has less than `keep` of its length before it, is
  left out.
  """
  end = len(video.features) + 0.5
  start, stop = video.segments.T
  length = np.maximum(stop - start, 1e-9)
  held = (start < end) & ((np.minimum(stop, end) - start) / length >= keep)
  segments = np.minimum(video.segments[held], end).astype(np.float32)
  return Video(video.features, segments, video.labels[held])


def crop(
  video: Video,
  length: int,
  *,
  draw: Callable[[int, int], int],
  ratio: tuple[float, float] | None = (0.9, 1.0),
  keep: float = 0.5,
) -> Video:
  """Cut a random stretch out of a video that holds at least one action.

  A longer video is cut to `length` steps, a shorter one to a random part of
  its own. Up to 200 places are tried; if none holds an action, the last one
  serves.

  Args:
    video: to cut.
    length: largest number of steps of the result.
    draw: (low, high) -> a random integer, both ends included.
    ratio: range of the part that is kept of a video that fits; None keeps it
      whole.
    keep: part of an action that must be in the stretch for it to be kept; it
      is then cut at the ends of the stretch.
  """
  n = len(video.features)
  if n <= length:
    if ratio is None:
      return video
    low, high = (round(r * n) for r in ratio)
    length = draw(max(low, 1), min(high, n))
    if length == n:
      return video
  spans = np.maximum(video.segments[:, 1] - video.segments[:, 0], 1e-9)
  for _ in range(_TRIALS):
    start = draw(0, n - length)
    cut_to = np.clip(video.segments, start, start + length)
    held = (cut_to[:, 1] - cut_to[:, 0]) / spans >= keep
    if held.any():
      break
  return Video(
    video.features[start : start + length],
    (cut_to[held] - start).astype(np.float32),
    video.labels[held],
  )
