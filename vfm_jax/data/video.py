"""Read frames of one video by index.

A `Reader` answers `read(indices)` with exactly the frames that decoding the
whole video in order would give, whatever the order of the indices. `avreader`
has the one for encoded files; the readers here serve frames that need no codec.
"""

import abc
import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Self

import numpy as np

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png')


class BadVideo(ValueError):
  """Say which example can not be used and why.

  The pipeline replaces such an example by a neighbour and counts it; any other
  exception stops the run.

  Attributes:
    name: path or id of the video.
    reason: what is wrong with it.
  """

  def __init__(self, name: str, reason: str):
    # Both go to ValueError so that the exception survives pickling.
    super().__init__(name, reason)
    self.name = name
    self.reason = reason

  def __str__(self) -> str:
    return f'{self.name}: {self.reason}'


class DecodeError(BadVideo):
  """The frames of the video can't be had: missing, empty, truncated, ..."""


class LabelError(BadVideo):
  """The label of the video is not a valid class."""


class Reader(abc.ABC):
  """Give random access to the frames of one video; a context manager.

  Attributes:
    num_frames: number of frames, at least 1.
    fps: mean frame rate, frames a second.
    height: pixels.
    width: pixels.
  """

  num_frames: int
  fps: float
  height: int
  width: int

  @abc.abstractmethod
  def read(self, indices: np.ndarray) -> np.ndarray:
    """Return uint8 [n, H, W, 3] RGB frames at the indices int [n].

    Indices may repeat and come in any order.

    Raises:
      IndexError: an index is outside [0, num_frames).
      DecodeError: a frame can't be decoded.
    """

  def close(self) -> None:  # noqa: B027
    """Release the file; readers without one have nothing to do."""

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exc: object) -> None:
    self.close()

  def checked(self, indices: np.ndarray) -> np.ndarray:
    """Return the indices as int64 [n] after a range check."""
    indices = np.asarray(indices, np.int64)
    if indices.ndim != 1 or not indices.size:
      raise IndexError(f'frame indices must be [n], n > 0: {indices.shape}')
    if indices.min() < 0 or indices.max() >= self.num_frames:
      raise IndexError(
        f'frame indices {indices.min()}..{indices.max()} are outside the '
        f'{self.num_frames} frames of the video'
      )
    return indices


@dataclasses.dataclass(frozen=True)
class Video:
  """Describe one example of a source; nothing is opened yet.

  Attributes:
    id: name of the video, unique in its source.
    labels: class index by label name.
    open: opens a reader; raises `DecodeError`.
  """

  id: str
  labels: Mapping[str, int]
  open: Callable[[], Reader]


class ArrayReader(Reader):
  """Serve frames uint8 [N, H, W, C] that are in memory."""

  def __init__(self, frames: np.ndarray, fps: float, name: str = 'array'):
    if frames.ndim != 4 or frames.dtype != np.uint8:
      raise DecodeError(
        name,
        'frames must be uint8 [N, H, W, C], got '
        f'{frames.dtype} {list(frames.shape)}',
      )
    if not len(frames):
      raise DecodeError(name, 'zero frames')
    self._frames = frames
    self.num_frames, self.height, self.width = frames.shape[:3]
    self.fps = float(fps)

  def read(self, indices: np.ndarray) -> np.ndarray:
    """Return uint8 [n, H, W, C] frames; see `Reader`."""
    return self._frames[self.checked(indices)]


class FrameFolderReader(Reader):
  """Serve a folder of jpg or png images, sorted by name, as a video."""

  def __init__(self, folder: str | pathlib.Path, fps: float):
    folder = pathlib.Path(folder)
    self._name = str(folder)
    if not folder.is_dir():
      raise DecodeError(self._name, 'missing: no such folder of frames')
    self._files = sorted(
      p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES
    )
    if not self._files:
      raise DecodeError(self._name, 'zero frames: no jpg or png in the folder')
    self.num_frames = len(self._files)
    self.fps = float(fps)
    self.height, self.width = self._image(0).shape[:2]

  def _image(self, index: int) -> np.ndarray:
    return _read_image(self._name, self._files[index])

  def read(self, indices: np.ndarray) -> np.ndarray:
    """Return uint8 [n, H, W, 3] frames; see `Reader`."""
    unique, inverse = np.unique(self.checked(indices), return_inverse=True)
    frames = [self._image(i) for i in unique]
    for i, frame in zip(unique, frames, strict=True):
      if frame.shape != (self.height, self.width, 3):
        raise DecodeError(
          self._name,
          f'frame {self._files[i].name} is {frame.shape[:2]}, the first one '
          f'{(self.height, self.width)}',
        )
    return np.stack(frames)[inverse]


def open_image(file: str | pathlib.Path) -> ArrayReader:
  """Serve an image as a video of one frame.

  Raises:
    DecodeError: it is not a readable image.
  """
  image = _read_image(str(file), pathlib.Path(file))
  return ArrayReader(image[None], 1.0, str(file))


def _read_image(name: str, file: pathlib.Path) -> np.ndarray:
  """Return uint8 [H, W, 3]; errors are about the video `name`."""
  import PIL.Image

  try:
    with PIL.Image.open(file) as image:
      return np.asarray(image.convert('RGB'))
  except OSError as e:
    raise DecodeError(
      name, f'frame {file.name} is not a readable image: {e}'
    ) from e
