"""Write and read embeddings on disk, one video a group of three files.

The layout of the TWLV-I evaluation framework (arXiv 2408.11318, repository):

    <root>/<dataset>/[uniform|multi-clip/]{train,val}/<id>.json    metadata
                                                      <id>_c.npy   f32 [M, D]
                                                      <id>_v.npy   f32 [D]

`_c` has a row a clip in time order, `_v` one vector for the video. Stores
written by the official scripts read as well: extra files are ignored, a
`_v` of shape [1, D] is squeezed, and missing metadata keys are None.
"""

import dataclasses
import functools
import json
import os
import pathlib
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from vfm_jax.evals.base import Features

Sampling = Literal['uniform', 'multi-clip']


class StoreError(ValueError):
  """Say which file of a store is wrong, and how."""


@dataclasses.dataclass(frozen=True, eq=False)
class Embedding:
  """Hold the embeddings of one video and what is known about it.

  Attributes:
    id: name of the video, also of its files.
    clips: f32 [M, D], a row a clip in time order.
    video: f32 [D]; the writer takes the mean of the clips where it is None,
      the reader always gives it.
    annotation: class, or None where there is none.
    labels: further classes by name.
    duration: seconds.
    num_frames: frames in the whole video.
    spans: [M] pairs (start, end) in seconds.
    fps: frames a second of the video.
    clip_length: seconds a clip covers; None when it covers the whole video.
    stride: seconds between the starts of clips; None as above.
    sampling: how clips were placed.
  """

  id: str
  clips: np.ndarray
  video: np.ndarray | None = None
  annotation: int | None = None
  labels: Mapping[str, int] = dataclasses.field(default_factory=dict)
  duration: float | None = None
  num_frames: int | None = None
  spans: Sequence[tuple[float, float]] | None = None
  fps: float | None = None
  clip_length: float | None = None
  stride: float | None = None
  sampling: str | None = None


def split_folder(
  root: str | os.PathLike,
  dataset: str,
  split: str,
  sampling: Sampling | None = None,
) -> pathlib.Path:
  """Return the folder of a split; without `sampling` it has no such level."""
  return pathlib.Path(root, dataset, *filter(None, [sampling]), split)


def file_id(video_id: str) -> str:
  """Return a video id as a file name: / \\ % and a leading . become %XX."""
  for char in '%/\\':
    video_id = video_id.replace(char, f'%{ord(char):02X}')
  return f'%2E{video_id[1:]}' if video_id.startswith('.') else video_id


def write(folder: str | os.PathLike, item: Embedding) -> None:
  """Write one video; a reader sees all of it or none of it.

  Each file is renamed into place when complete, the json last: a video
  without its json does not exist.

  Raises:
    StoreError: the id is no file name, or an array is empty, not finite or
      of the wrong rank.
  """
  if (
    not item.id or item.id.startswith('.') or '/' in item.id or '\\' in item.id
  ):
    raise StoreError(
      f'{item.id!r} is no file name: take store.file_id() of the video id'
    )
  folder = pathlib.Path(folder)
  clips = np.asarray(item.clips, np.float32)
  _check(folder / f'{item.id}_c.npy', clips, rank=2)
  video = clips.mean(0) if item.video is None else item.video
  video = np.asarray(video, np.float32)
  _check(folder / f'{item.id}_v.npy', video, rank=1, dim=clips.shape[1])
  if item.spans is not None and len(item.spans) != len(clips):
    raise StoreError(
      f'{item.id}: {len(item.spans)} spans for {len(clips)} clips'
    )
  spans = item.spans
  if spans is not None:
    spans = [[float(a), float(b)] for a, b in spans]
  meta = {
    'annotation': item.annotation,
    'labels': {k: int(v) for k, v in item.labels.items()},
    'duration': item.duration,
    'num_frames': item.num_frames,
    'clips': spans,
    'fps': item.fps,
    'clip_length': item.clip_length,
    'stride': item.stride,
    'sampling': item.sampling,
  }
  folder.mkdir(parents=True, exist_ok=True)
  # A rewrite must not pair the old json with new arrays after a crash.
  (folder / f'{item.id}.json').unlink(missing_ok=True)
  replace(folder / f'{item.id}_c.npy', lambda f: np.save(f, clips))
  replace(folder / f'{item.id}_v.npy', lambda f: np.save(f, video))
  text = json.dumps(meta, indent=1, default=_number).encode()
  replace(folder / f'{item.id}.json', lambda f: f.write(text))


@dataclasses.dataclass(frozen=True)
class EmbeddingStore:
  """Read the embeddings of one split, in the order of their ids.

  Attributes:
    root: folder that holds the datasets.
    dataset: its name.
    split: `train` or `val`.
    sampling: `uniform` or `multi-clip` where the layout has that level.
    num_classes: labels at or above it are refused; None accepts any.
  """

  root: str
  dataset: str
  split: str
  sampling: Sampling | None = None
  num_classes: int | None = None

  @property
  def folder(self) -> pathlib.Path:
    """Folder of the split."""
    return split_folder(self.root, self.dataset, self.split, self.sampling)

  @functools.cached_property
  def ids(self) -> tuple[str, ...]:
    """Names of the videos, sorted."""
    if not self.folder.is_dir():
      raise StoreError(f'{self.folder}: no such folder of embeddings')
    names = sorted(p.stem for p in self.folder.glob('*.json'))
    if not names:
      raise StoreError(f'{self.folder}: no <id>.json in it')
    return tuple(names)

  def __len__(self) -> int:
    return len(self.ids)

  def __iter__(self) -> Iterator[Embedding]:
    return map(self.read, self.ids)

  def __getitem__(self, i: int) -> Embedding:
    return self.read(self.ids[i])

  def read(self, video_id: str) -> Embedding:
    """Return one video.

    Raises:
      StoreError: a file is missing, unreadable, empty, not finite, of the
        wrong rank, or a label is out of range; the message names the file.
    """
    stem = self.folder / video_id
    path = stem.with_name(f'{video_id}.json')
    meta = read_json(path)
    clips = _read_array(stem.with_name(f'{video_id}_c.npy'), rank=2)
    video = _read_array(
      stem.with_name(f'{video_id}_v.npy'), rank=1, dim=clips.shape[1]
    )
    labels = meta.get('labels') or {}
    if not isinstance(labels, dict):
      raise StoreError(f'{path}: labels must be a dict, found {labels!r}')
    spans = meta.get('clips') or None
    if spans is not None and np.shape(spans) != (len(clips), 2):
      raise StoreError(
        f'{path}: clips must hold a start and an end for each of the '
        f'{len(clips)} clips'
      )
    return Embedding(
      id=video_id,
      clips=clips,
      video=video,
      annotation=self._label(path, 'annotation', meta.get('annotation')),
      labels={
        k: label
        for k, v in labels.items()
        if (label := self._label(path, k, v)) is not None
      },
      duration=meta.get('duration'),
      num_frames=meta.get('num_frames'),
      spans=None if spans is None else [(a, b) for a, b in spans],
      fps=meta.get('fps'),
      clip_length=meta.get('clip_length'),
      stride=meta.get('stride'),
      sampling=meta.get('sampling'),
    )

  def read_clips(self, video_id: str) -> Embedding:
    """Return the clips of one video, for tasks with labels of their own.

    Neither `_v` nor an annotation is looked at, and what the json may lack is
    None.

    Raises:
      StoreError: a file is missing, unreadable, empty, not finite or of the
        wrong rank; the message names the file.
    """
    stem = self.folder / video_id
    meta = read_json(stem.with_name(f'{video_id}.json'))
    return Embedding(
      id=video_id,
      clips=read_clips(stem.with_name(f'{video_id}_c.npy')),
      duration=meta.get('duration'),
      num_frames=meta.get('num_frames'),
      fps=meta.get('fps'),
      clip_length=meta.get('clip_length'),
      stride=meta.get('stride'),
      sampling=meta.get('sampling'),
    )

  def features(
    self,
    rows: Literal['video', 'clip'] = 'video',
    label: str = 'annotation',
  ) -> Features:
    """Return the split for the probes: one row a video, or all its clips.

    Args:
      rows: `video` takes `_v`, `clip` every row of `_c`.
      label: `annotation`, or a name in the `labels` of the json.

    Raises:
      StoreError: as `read`, or a video lacks the label, or widths differ.
    """
    x, y = [], []
    for item in self:
      path = self.folder / f'{item.id}.json'
      named = {**item.labels, 'annotation': item.annotation}
      if named.get(label) is None:
        have = sorted(k for k, v in named.items() if v is not None)
        raise StoreError(f'{path}: no label {label!r}; it has {have}')
      if x and item.clips.shape[-1] != x[0].shape[-1]:
        raise StoreError(
          f'{self.folder / f"{item.id}_c.npy"}: {item.clips.shape[-1]} '
          f'features, the videos before it have {x[0].shape[-1]}'
        )
      x.append(np.asarray(item.video)[None] if rows == 'video' else item.clips)
      y.append(named[label])
    return Features.of_clips(x, np.array(y))

  def _label(self, path: pathlib.Path, name: str, value) -> int | None:
    if value is None:
      return None
    try:
      label = int(value)
      if label != float(value):
        raise ValueError('not a whole number')
    except (TypeError, ValueError) as e:
      raise StoreError(f'{path}: {name} is no class: {value!r}') from e
    top = self.num_classes
    if label < 0 or (top is not None and name == 'annotation' and label >= top):
      limit = '0 or more' if top is None else f'in [0, {top})'
      raise StoreError(f'{path}: {name} must be {limit}, found {label}')
    return label


def read_json(path: pathlib.Path) -> dict:
  """Return the json object of a file.

  Raises:
    StoreError: it is missing or holds no json object.
  """
  try:
    meta = json.loads(path.read_text())
  except (OSError, ValueError) as e:
    raise StoreError(f'{path}: unreadable json: {e}') from e
  if not isinstance(meta, dict):
    raise StoreError(f'{path}: expected a json object, found {meta!r}')
  return meta


def read_clips(path: pathlib.Path) -> np.ndarray:
  """Return the rows f32 [M, D] of a `_c.npy`.

  Raises:
    StoreError: it is missing, unreadable, empty, not finite or not [M, D].
  """
  return _read_array(path, rank=2)


def _read_array(path, *, rank: int, dim: int | None = None) -> np.ndarray:
  try:
    x = np.load(path, allow_pickle=False)
  except (OSError, ValueError, EOFError) as e:
    raise StoreError(f'{path}: unreadable array: {e}') from e
  if rank == 1 and x.ndim == 2 and len(x) == 1:
    x = x[0]
  if not np.issubdtype(x.dtype, np.floating):
    raise StoreError(f'{path}: expected floats, found {x.dtype}')
  _check(path, x, rank=rank, dim=dim)
  return x.astype(np.float32)


def _check(path, x: np.ndarray, *, rank: int, dim: int | None = None) -> None:
  if x.ndim != rank or 0 in x.shape:
    shape = '(M, D) with M >= 1' if rank == 2 else '(D,)'
    raise StoreError(f'{path}: expected {shape}, found {x.shape}')
  if dim is not None and x.shape[-1] != dim:
    raise StoreError(f'{path}: {x.shape[-1]} features, the clips have {dim}')
  if not np.isfinite(x).all():
    raise StoreError(f'{path}: NaN or infinity among the features')


def replace(path: pathlib.Path, save: Callable) -> None:
  """Write a file under a temporary name, then move it into place."""
  # Unlike those of tempfile, it has the permissions of other new files.
  name = path.with_name(f'.{path.name}.{secrets.token_hex(4)}.tmp')
  try:
    with open(name, 'xb') as f:
      save(f)
      f.flush()
      os.fsync(f.fileno())
    os.replace(name, path)
  except BaseException:
    name.unlink(missing_ok=True)
    raise


def _number(x):
  """Turn NumPy scalars into json numbers."""
  if isinstance(x, np.generic):
    return x.item()
  raise TypeError(f'{type(x).__name__} does not go into json')
