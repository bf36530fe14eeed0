"""Read the annotations of AVA, and clips around its key frames.

A csv has no header; its rows are `video,timestamp,x1,y1,x2,y2,action[,...]`
with corners from 0 to 1 and actions from 1; a row of detections ends with its
score (AVA v2.2, arXiv:1705.08421).
"""

import csv
import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from vfm_jax.data import augment, avreader, sources, video
from vfm_jax.evals.tas_data import AnnotationError

# A video and a second in it.
Frame = tuple[str, int]


class FrameBoxes(NamedTuple):
  """Hold the boxes of a frame: [n, 4] corners, actions [n], scores [n]."""

  boxes: np.ndarray
  actions: np.ndarray
  scores: np.ndarray


def read_boxes(
  path: str | os.PathLike,
  *,
  num_classes: int = 80,
  scored: bool = False,
) -> dict[Frame, FrameBoxes]:
  """Return the boxes of each frame, frames in the order of the file.

  Args:
    path: csv file.
    num_classes: the largest action.
    scored: rows end with a score, as those of detections do.

  Raises:
    AnnotationError: the file is unreadable or empty, or a row is no such row,
      has an unknown action, or a box that ends before it starts; the message
      names file and line.
  """
  found: dict[Frame, list[tuple]] = {}
  for line, row in _rows(path):
    if len(row) not in ((8,) if scored else (7, 8)):
      raise AnnotationError(
        f'{path}:{line}: expected video,timestamp,x1,y1,x2,y2,action'
        f'{",score" if scored else "[,person]"}, found {len(row)} columns'
      )
    try:
      frame = (row[0], _second(row[1]))
      box = tuple(float(x) for x in row[2:6])
      action, score = int(row[6]), float(row[7]) if scored else 1.0
    except ValueError as e:
      raise AnnotationError(f'{path}:{line}: no number: {e}') from e
    if not 1 <= action <= num_classes:
      raise AnnotationError(
        f'{path}:{line}: unknown action {action}, expected 1 to {num_classes}'
      )
    if not scored and (box[2] <= box[0] or box[3] <= box[1]):
      raise AnnotationError(
        f'{path}:{line}: the box ends before it starts: x {box[0]} to '
        f'{box[2]}, y {box[1]} to {box[3]}'
      )
    found.setdefault(frame, []).append((box, action, score))
  if not found:
    raise AnnotationError(f'{path}: is empty')
  return {
    frame: FrameBoxes(
      np.array([r[0] for r in rows], float),
      np.array([r[1] for r in rows], int),
      np.array([r[2] for r in rows], float),
    )
    for frame, rows in found.items()
  }


def write_boxes(
  path: str | os.PathLike, found: Mapping[Frame, FrameBoxes]
) -> None:
  """Write detections as the official script reads them, with 5 decimals."""
  with open(path, 'w', newline='') as f:
    writer = csv.writer(f)
    for (name, second), frame in found.items():
      for box, action, score in zip(*frame, strict=True):
        corners = [f'{x:.5f}' for x in box]
        row = [name, f'{second:04d}', *corners, action, f'{score:.5f}']
        writer.writerow(row)


def read_excluded(path: str | os.PathLike) -> frozenset[Frame]:
  """Return the frames that are not scored, rows `video,timestamp`.

  Raises:
    AnnotationError: the file is unreadable, or a row is no such row.
  """
  out = set()
  for line, row in _rows(path):
    try:
      name, second = row
      out.add((name, _second(second)))
    except ValueError as e:
      raise AnnotationError(
        f'{path}:{line}: expected video,timestamp, found {",".join(row)!r}'
      ) from e
  return frozenset(out)


def read_classes(path: str | os.PathLike) -> dict[int, str]:
  """Return the names of the actions in a label map (.pbtxt), by number.

  Raises:
    AnnotationError: the file is unreadable or lists no action.
  """
  try:
    text = pathlib.Path(path).read_text()
  except (OSError, UnicodeDecodeError) as e:
    raise AnnotationError(f'{path}: unreadable: {e}') from e
  items = re.findall(r'name:\s*"([^"]*)"\s*(?:label_)?id:\s*(\d+)', text)
  if not items:
    raise AnnotationError(f'{path}: expected items with a name and an id')
  return {int(number): name for name, number in items}


@dataclasses.dataclass(frozen=True)
class KeyFrames:
  """Give a stretch of video around each annotated frame; a `Source`.

  The id of an example is `<video>,<timestamp>`; it has no labels, and what a
  csv says of the frame is looked up by the id.

  Attributes:
    root: folder of `<video>.<suffix>`.
    csv: annotations; each frame with a box is an example.
    excluded: csv of frames to leave out, or None.
    window: length of the stretch, seconds; the frame is in its middle.
    offset: second of the video that the files start at.
    num_classes: the largest action.
  """

  root: str
  csv: str
  excluded: str | None = None
  window: float = 64 / 30
  offset: float = 0.0
  num_classes: int = 80

  @property
  def label_names(self) -> tuple[str, ...]:
    """No labels: there may be several boxes and actions."""
    return ()

  @functools.cached_property
  def frames(self) -> tuple[Frame, ...]:
    """The annotated frames, in the order of the file."""
    left_out = read_excluded(self.excluded) if self.excluded else frozenset()
    boxes = read_boxes(self.csv, num_classes=self.num_classes)
    return tuple(f for f in boxes if f not in left_out)

  @functools.cached_property
  def files(self) -> dict[str, str]:
    """Paths of the videos by name."""
    return {
      p.stem: os.fspath(p)
      for p in sorted(pathlib.Path(self.root).glob('*'))
      if p.suffix.lower() in sources.VIDEO_SUFFIXES
    }

  def __len__(self) -> int:
    return len(self.frames)

  def __getitem__(self, index: int) -> video.Video:
    """Describe the stretch around frame `index`.

    Raises:
      DecodeError: there is no file of the video.
    """
    sources.check_index(index, len(self))
    frame = name, second = self.frames[index]
    if name not in self.files:
      raise video.DecodeError(name, f'no such video in {self.root}')
    opens = functools.partial(
      Stretch.open, self.files[name], second - self.offset, self.window
    )
    return video.Video(frame_id(frame), {}, opens)


class Stretch(video.Reader):
  """Read the frames around a moment of another reader.

  Frames before the first and after the last repeat it, so that the moment
  stays in the middle.

  Args:
    reader: the whole video.
    moment: seconds from its start.
    window: length, seconds.
    name: of the video.
  """

  def __init__(
    self, reader: video.Reader, moment: float, window: float, name: str
  ):
    self._reader = reader
    self.fps, self.height, self.width = reader.fps, reader.height, reader.width
    self.num_frames = max(round(window * reader.fps), 1)
    middle = round(moment * reader.fps)
    if not 0 <= middle <= reader.num_frames:
      raise video.DecodeError(
        name,
        f'second {moment:g} is outside of its '
        f'{reader.num_frames / reader.fps:g} seconds',
      )
    self._first = middle - self.num_frames // 2

  @classmethod
  def open(cls, file: str, moment: float, window: float) -> 'Stretch':
    """Open a video file; arguments as for the class."""
    return cls(avreader.PyAVReader(file), moment, window, file)

  def read(self, indices: np.ndarray) -> np.ndarray:
    """Return uint8 [n, H, W, 3]; see `Reader`."""
    at = self._first + self.checked(indices)
    return self._reader.read(np.clip(at, 0, self._reader.num_frames - 1))

  def close(self) -> None:
    """Release the file."""
    self._reader.close()


def frame_id(frame: Frame) -> str:
  """Return `<video>,<timestamp>`."""
  return f'{frame[0]},{frame[1]:04d}'


def whole_frame(
  frames: np.ndarray, rng: np.random.Generator, *, size: int = 224
) -> np.ndarray:
  """Resize frames [T, H, W, 3] to a square: boxes in [0, 1] stay right."""
  del rng
  return augment.resize(frames, size, size)


def _rows(path):
  """Yield (line, row) of the rows of a csv that are not empty."""
  try:
    with open(path, newline='') as f:
      reader = csv.reader(f)
      for row in reader:
        if row:
          yield reader.line_num, row
  except (OSError, UnicodeDecodeError) as e:
    raise AnnotationError(f'{path}: unreadable: {e}') from e


def _second(text: str) -> int:
  return int(float(text))
