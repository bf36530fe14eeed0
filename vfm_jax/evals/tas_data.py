"""Read 50Salads, GTEA and Breakfast as their annotations are distributed.

    <root>/mapping.txt                 `number name` a line
          /groundTruth/<video>.txt     the name of a class a frame
          /splits/train.split1.bundle  `<video>.txt` a line
          /splits/test.split1.bundle
    <features>/<video>_c.npy           f32 [M, D], a row a clip

(ASFormer and MS-TCN repositories; features as in `evals/store.py`.) A ground
truth file may also hold segments, as Breakfast is distributed by its authors:
`first-last name` a line, frames from 1, both ends included.
"""

import dataclasses
import functools
import pathlib
import re
from typing import Literal

import numpy as np

from vfm_jax.evals import store

Missing = Literal['error', 'skip']

_SEGMENT = re.compile(r'(\d+)-(\d+)\s+(\S+)')


class AnnotationError(ValueError):
  """Say which annotation is wrong, and how."""


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledVideo:
  """Hold a video.

  Attributes:
    id: its name.
    x: f32 [L, D] features of the sampled frames.
    y: int32 [L] classes of the sampled frames.
    frames: int32 [F] classes of all frames, L = ceil(F / sample_rate).
  """

  id: str
  x: np.ndarray
  y: np.ndarray
  frames: np.ndarray


@dataclasses.dataclass(frozen=True)
class FrameLabels:
  """Read the annotations of one data set.

  Attributes:
    root: folder with `mapping.txt`, `groundTruth` and `splits`.
  """

  root: str

  @functools.cached_property
  def classes(self) -> tuple[str, ...]:
    """Names of the classes, by number.

    Raises:
      AnnotationError: the file is missing, a line is no `number name`, or the
        numbers are not 0, 1, ... in some order.
    """
    path = pathlib.Path(self.root, 'mapping.txt')
    found: dict[int, str] = {}
    for number, line in enumerate(_lines(path), 1):
      parts = line.split()
      if len(parts) != 2 or not parts[0].isdigit():
        raise AnnotationError(
          f'{path}:{number}: expected `number name`, found {line!r}'
        )
      if int(parts[0]) in found or parts[1] in found.values():
        raise AnnotationError(f'{path}:{number}: {line!r} is there already')
      found[int(parts[0])] = parts[1]
    if sorted(found) != list(range(len(found))):
      raise AnnotationError(
        f'{path}: expected classes 0 to {len(found) - 1}, found {sorted(found)}'
      )
    return tuple(found[i] for i in range(len(found)))

  def split(self, part: Literal['train', 'test'], number: int) -> list[str]:
    """Return the videos of a split in the order of its bundle.

    Raises:
      AnnotationError: the bundle is missing or lists nothing, or a video twice.
    """
    path = pathlib.Path(self.root, 'splits', f'{part}.split{number}.bundle')
    names = [line.strip().split('.')[0] for line in _lines(path)]
    if len(set(names)) != len(names):
      twice = sorted({n for n in names if names.count(n) > 1})
      raise AnnotationError(f'{path}: lists {twice} more than once')
    return names

  def frames(self, video: str) -> np.ndarray:
    """Return the class of each frame of a video, int32 [F].

    Raises:
      AnnotationError: the file is missing or empty, a class is not in
        `mapping.txt`, or segments end before they start, overlap or leave a
        gap; the message names file and line.
    """
    path = pathlib.Path(self.root, 'groundTruth', f'{video}.txt')
    lines = _lines(path)
    number = {name: i for i, name in enumerate(self.classes)}

    def look_up(name: str, at: int) -> int:
      if name not in number:
        raise AnnotationError(
          f'{path}:{at}: unknown class {name!r}; '
          f'{pathlib.Path(self.root, "mapping.txt")} has '
          f'{", ".join(self.classes)}'
        )
      return number[name]

    if not _SEGMENT.fullmatch(lines[0].strip()):
      labels = [look_up(s.strip(), i) for i, s in enumerate(lines, 1)]
      return np.array(labels, np.int32)
    labels = []
    for at, line in enumerate(lines, 1):
      segment = _SEGMENT.fullmatch(line.strip())
      if not segment:
        raise AnnotationError(
          f'{path}:{at}: expected `first-last name`, found {line!r}'
        )
      first, last = int(segment[1]), int(segment[2])
      if last < first:
        raise AnnotationError(
          f'{path}:{at}: the segment ends before it starts: {line!r}'
        )
      if first != len(labels) + 1:
        raise AnnotationError(
          f'{path}:{at}: expected a segment from frame {len(labels) + 1} on, '
          f'found {line!r}'
        )
      labels += [look_up(segment[3], at)] * (last - first + 1)
    return np.array(labels, np.int32)

  def load(
    self,
    videos: list[str],
    features: pathlib.Path,
    *,
    sample_rate: int = 1,
    missing: Missing = 'error',
    kept: dict[str, LabelledVideo] | None = None,
  ) -> list[LabelledVideo]:
    """Return videos with their features, in the order given.

    Args:
      videos: their names.
      features: folder of `<video>_c.npy`.
      sample_rate: every so many frames are used, from the first.
      missing: what becomes of a video without features: 'skip' leaves it out
        as the released code does, without a word.
      kept: videos that are loaded already; what is read is added.

    Raises:
      StoreError: features are missing, unreadable or of another width than
        those before; the message names the file.
      AnnotationError: as `frames`, or no video is left.
    """
    kept = {} if kept is None else kept
    out = []
    for video in videos:
      path = features / f'{video}_c.npy'
      if missing == 'skip' and not path.exists():
        continue
      if video not in kept:
        frames = self.frames(video)
        y = frames[::sample_rate]
        kept[video] = LabelledVideo(
          video, resample(store.read_clips(path), len(y)), y, frames
        )
      item = kept[video]
      if out and item.x.shape[1] != out[0].x.shape[1]:
        raise store.StoreError(
          f'{path}: {item.x.shape[1]} features, those of {out[0].id} have '
          f'{out[0].x.shape[1]}'
        )
      out.append(item)
    if not out:
      raise AnnotationError(
        f'{features}: has features of none of {len(videos)} videos, the first '
        f'of which is {videos[0]}'
      )
    return out


def resample(x: np.ndarray, length: int) -> np.ndarray:
  """Interpolate rows [M, D] linearly to [length, D].

  Row i of n stands at (i + 1/2) / n; outside the first and the last they hold.
  """
  m = len(x)
  if m == length:
    return x
  # In float32, as torch does it.
  half = np.float32(0.5)
  place = (np.arange(length, dtype=np.float32) + half) * np.float32(m / length)
  place = np.clip(place - half, 0, m - 1)
  low = np.floor(place).astype(np.int32)
  high = np.minimum(low + 1, m - 1)
  part = (place - low)[:, None]
  return x[low] * (1 - part) + x[high] * part


def runs(
  y: np.ndarray, classes: tuple[str, ...], fps: float
) -> list[tuple[float, float, str]]:
  """Return (start, end, name) in seconds of each run of int [F]."""
  starts = np.flatnonzero(np.r_[True, y[1:] != y[:-1]])
  ends = np.r_[starts[1:], len(y)]
  return [
    (a / fps, b / fps, classes[int(y[a])])
    for a, b in zip(starts.tolist(), ends.tolist(), strict=True)
  ]


def _lines(path: pathlib.Path) -> list[str]:
  """Return the lines of a file without empty ones at its end."""
  try:
    text = path.read_text()
  except (OSError, UnicodeDecodeError) as e:
    raise AnnotationError(f'{path}: unreadable: {e}') from e
  lines = text.rstrip().splitlines()
  if not lines:
    raise AnnotationError(f'{path}: is empty')
  return lines
