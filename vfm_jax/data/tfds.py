"""Read TensorFlow Datasets builders, without TensorFlow at run time.

Builders must be stored in a random access format (`file_format='array_record'`
at download_and_prepare). A video feature may be encoded bytes, an array of
frames, or a sequence of images.
"""

import dataclasses
import functools

import numpy as np

from vfm_jax import optional
from vfm_jax.data import avreader, once, sources, video


@dataclasses.dataclass(frozen=True)
class TFDS:
  """Read one split of a TFDS builder as videos.

  Attributes:
    name: builder name, with a config and a version where wanted.
    split: split name or slice, for example `train[:10%]`.
    data_dir: folder of the prepared builders; None is the TFDS default.
    video_key: feature that holds the video.
    label_keys: integer features to read as labels.
    fps: frame rate of features that hold frames; encoded videos know theirs.
  """

  name: str
  split: str
  data_dir: str | None = None
  video_key: str = 'video'
  label_keys: tuple[str, ...] = ('label',)
  fps: float = 25.0

  @property
  def label_names(self) -> tuple[str, ...]:
    """Names of the labels."""
    return self.label_keys

  def __len__(self) -> int:
    return len(_data_source(self.name, self.split, self.data_dir))

  def __getitem__(self, index: int) -> video.Video:
    data = _data_source(self.name, self.split, self.data_dir)
    sources.check_index(index, len(data))
    example = data[index]
    absent = [k for k in (self.video_key, *self.label_keys) if k not in example]
    if absent:
      raise ValueError(
        f'data.source.video_key, data.source.label_keys: {self.name} has no '
        f'feature {", ".join(absent)}; it has {", ".join(sorted(example))}'
      )
    name = f'{self.name}/{self.split}/{index}'
    return video.Video(
      name,
      {k: _label(example[k], k, name) for k in self.label_keys},
      functools.partial(_open, example[self.video_key], self.fps, name),
    )


@once.once()
def _data_source(name: str, split: str, data_dir: str | None):
  """Open a builder once per process."""
  tfds = optional.require('tensorflow_datasets', 'tfds')
  return tfds.data_source(name, split=split, data_dir=data_dir)


def _label(value, key: str, name: str) -> int:
  label = int(value)
  if label < 0:
    raise video.LabelError(name, f'bad {key} {label}: negative')
  return label


def _open(value, fps: float, name: str) -> video.Reader:
  """Open what a feature holds: encoded bytes or frames."""
  if isinstance(value, bytes):
    return avreader.EncodedReader(value, name)
  return video.ArrayReader(np.asarray(value), fps, name)
