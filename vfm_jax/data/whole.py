"""Load whole videos with all their clips, for embeddings."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from vfm_jax.data import clips as clips_lib
from vfm_jax.data import examples, sources, video


class VideoClips(NamedTuple):
  """Hold all clips of one video.

  Attributes:
    id: name of the video.
    index: of the video in its source.
    labels: class index by label name.
    num_frames: frames in the whole video.
    fps: frames a second.
    duration: seconds.
    clips: uint8 [M, T, H, W, 3].
    spans: float64 [M, 2] start and end of each clip, seconds.
  """

  id: str
  index: int
  labels: dict[str, int]
  num_frames: int
  fps: float
  duration: float
  clips: np.ndarray
  spans: np.ndarray


@dataclasses.dataclass(frozen=True)
class Load:
  """Load all clips of the video at an index; picklable.

  The attributes are those of `examples.Train`.
  """

  source: sources.Source
  clip: Callable
  transform: Callable
  seed: int

  def __call__(self, index: int) -> tuple[VideoClips | None, list[list[str]]]:
    """Return the video, or None and what is wrong: [[name, reason]]."""
    try:
      return self._load(index), []
    except video.BadVideo as e:
      return None, [[e.name, e.reason]]

  def _load(self, index: int) -> VideoClips:
    rng = examples.generator(self.seed, 0, index)
    example = self.source[index]
    with example.open() as reader:
      num_frames, fps = reader.num_frames, reader.fps
      sampled = clips_lib.as_clips(self.clip(num_frames, fps, rng), fps)
      flat = reader.read(sampled.indices.ravel())
    frames = flat.reshape(*sampled.indices.shape, *flat.shape[1:])
    return VideoClips(
      id=example.id,
      index=index,
      labels=dict(example.labels),
      num_frames=num_frames,
      fps=fps,
      duration=num_frames / fps,
      clips=np.stack([self.transform(clip, rng) for clip in frames]),
      spans=sampled.spans,
    )
