"""Read plain folders: listed by a CSV, as found, folders of frames, images.

Rows and listings are read at the first use and kept per process, not in the
objects, which stay small and picklable.
"""

import csv as csv_lib
import dataclasses
import functools
import os
import pathlib
from typing import Literal

from vfm_jax.data import avreader, once, sources, video


@dataclasses.dataclass(frozen=True)
class FolderCSV:
  """List videos of a folder by a CSV file.

  Two layouts: `csv` has a header line `path,label[,more]` in any order; `list`
  has no header and one line `path label [more]` a video, separated by spaces,
  as VideoMAE ships its lists (labels are the last columns, in the order of
  `label_columns`; without label columns the first word is the path).

  A missing file or a bad label spoils its row only: `source[i]` or opening it
  raises `BadVideo`, which the pipeline counts.

  Attributes:
    root: folder that the paths are relative to.
    csv: path of the CSV file.
    label_columns: columns to read as labels; the label is named like its
      column. May be empty.
    classes: class names of each label column. Where given, the column holds
      names; where absent or empty it holds integers from 0.
    num_classes: number of classes of each integer label column, to check the
      range; 0 or absent leaves it unchecked.
    layout: `csv` or `list`.
    threads: decoder threads a video.
  """

  root: str
  csv: str
  label_columns: tuple[str, ...] = ('label',)
  classes: tuple[tuple[str, ...], ...] = ()
  num_classes: tuple[int, ...] = ()
  layout: Literal['csv', 'list'] = 'csv'
  threads: int = 1

  @property
  def label_names(self) -> tuple[str, ...]:
    """Names of the labels."""
    return self.label_columns

  def __len__(self) -> int:
    return len(_rows(self.csv, self.layout, self.label_columns))

  def __getitem__(self, index: int) -> video.Video:
    rows = _rows(self.csv, self.layout, self.label_columns)
    sources.check_index(index, len(rows))
    line, path, texts = rows[index]
    if not path:
      raise video.DecodeError(f'{self.csv}:{line}', 'the row has no path')
    labels = {
      name: self._label(k, text, f'{path} ({self.csv}:{line})')
      for k, (name, text) in enumerate(
        zip(self.label_columns, texts, strict=True)
      )
    }
    file = os.path.join(self.root, path)
    return video.Video(
      path,
      labels,
      functools.partial(avreader.PyAVReader, file, threads=self.threads),
    )

  def _label(self, column: int, text: str, where: str) -> int:
    """Turn one cell into a class index."""
    name = self.label_columns[column]
    classes = self.classes[column] if column < len(self.classes) else ()
    if classes:
      if text not in classes:
        raise video.LabelError(
          where, f'bad {name} {text!r}: not one of {len(classes)} classes'
        )
      return classes.index(text)
    try:
      label = int(text)
    except ValueError as e:
      raise video.LabelError(
        where,
        f'bad {name} {text!r}: not an integer (data.source.classes '
        'turns names into labels)',
      ) from e
    bound = self.num_classes[column] if column < len(self.num_classes) else 0
    if label < 0 or (bound and label >= bound):
      raise video.LabelError(
        where,
        f'bad {name} {label}: outside 0..{bound - 1 if bound else "n"}',
      )
    return label


@once.once()
def _rows(
  csv: str, layout: str, columns: tuple[str, ...]
) -> tuple[tuple[int, str, tuple[str, ...]], ...]:
  """Read (line number, path, label texts) of each row."""
  try:
    with open(csv, newline='', encoding='utf-8-sig') as f:
      rows = (_csv_rows if layout == 'csv' else _list_rows)(f, csv, columns)
  except OSError as e:
    raise ValueError(f'data.source.csv: can not read {csv}: {e}') from e
  if not rows:
    raise ValueError(f'data.source.csv: {csv} lists no video')
  return tuple(rows)


def _csv_rows(f, csv, columns):
  reader = csv_lib.DictReader(f)
  header = reader.fieldnames or []
  missing = [c for c in ('path', *columns) if c not in header]
  if missing:
    raise ValueError(
      f'data.source.csv: {csv} has no column {", ".join(missing)}; its header '
      f'is {",".join(header) or "absent"} (set data.source.label_columns, or '
      "data.source.layout='list' for lines `path label` without a header)"
    )
  return [
    (
      reader.line_num,
      (row['path'] or '').strip(),
      tuple((row[c] or '').strip() for c in columns),
    )
    for row in reader
  ]


def _list_rows(f, csv, columns):
  rows = []
  for number, line in enumerate(f, 1):
    if not line.strip():
      continue
    # Labels are cut from the right: a path may hold spaces.
    if columns:
      path, *labels = line.strip().rsplit(maxsplit=len(columns))
    else:
      path, labels = line.split()[0], []
    if len(labels) != len(columns):
      raise ValueError(
        f'data.source.csv: line {number} of {csv} needs a path and '
        f'{len(columns)} labels ({", ".join(columns)}): {line.strip()!r}'
      )
    rows.append((number, path, tuple(labels)))
  return rows


@dataclasses.dataclass(frozen=True)
class FolderVideos:
  """Take all videos under a folder, sorted by path.

  Attributes:
    root: folder to search, with its sub-folders.
    label: name of the label that the first sub-folder gives (classes are the
      sorted folder names); empty for no labels.
    suffixes: file name endings to take.
    threads: decoder threads a video.
  """

  root: str
  label: str = ''
  suffixes: tuple[str, ...] = sources.VIDEO_SUFFIXES
  threads: int = 1

  @property
  def label_names(self) -> tuple[str, ...]:
    """Names of the labels."""
    return (self.label,) if self.label else ()

  @property
  def classes(self) -> tuple[str, ...]:
    """Sorted names of the sub-folders that hold videos."""
    return _classes(_files(self.root, self.suffixes))

  def __len__(self) -> int:
    return len(_files(self.root, self.suffixes))

  def __getitem__(self, index: int) -> video.Video:
    files = _files(self.root, self.suffixes)
    sources.check_index(index, len(files))
    return video.Video(
      files[index],
      _folder_label(self.label, files[index], self.classes),
      functools.partial(
        avreader.PyAVReader,
        os.path.join(self.root, files[index]),
        threads=self.threads,
      ),
    )


@dataclasses.dataclass(frozen=True)
class FrameFolders:
  """Take every folder of jpg or png images under a root as one video.

  Attributes:
    root: folder to search, with its sub-folders.
    fps: frame rate of all videos.
    label: as in `FolderVideos`.
  """

  root: str
  fps: float = 30.0
  label: str = ''

  @property
  def label_names(self) -> tuple[str, ...]:
    """Names of the labels."""
    return (self.label,) if self.label else ()

  @property
  def classes(self) -> tuple[str, ...]:
    """Sorted names of the first-level folders that hold videos."""
    return _classes(_frame_folders(self.root))

  def __len__(self) -> int:
    return len(_frame_folders(self.root))

  def __getitem__(self, index: int) -> video.Video:
    folders = _frame_folders(self.root)
    sources.check_index(index, len(folders))
    return video.Video(
      folders[index],
      _folder_label(self.label, folders[index], self.classes),
      functools.partial(
        video.FrameFolderReader,
        os.path.join(self.root, folders[index]),
        self.fps,
      ),
    )


@dataclasses.dataclass(frozen=True)
class FolderImages:
  """Take every jpg or png image under a root as a video of one frame.

  Attributes:
    root: folder to search, with its sub-folders, one a class as in ImageNet.
    label: as in `FolderVideos`.
  """

  root: str
  label: str = 'label'

  @property
  def label_names(self) -> tuple[str, ...]:
    """Names of the labels."""
    return (self.label,) if self.label else ()

  @property
  def classes(self) -> tuple[str, ...]:
    """Sorted names of the sub-folders that hold images."""
    return _classes(_files(self.root, video.IMAGE_SUFFIXES))

  def __len__(self) -> int:
    return len(_files(self.root, video.IMAGE_SUFFIXES))

  def __getitem__(self, index: int) -> video.Video:
    files = _files(self.root, video.IMAGE_SUFFIXES)
    sources.check_index(index, len(files))
    return video.Video(
      files[index],
      _folder_label(self.label, files[index], self.classes),
      functools.partial(
        video.open_image, os.path.join(self.root, files[index])
      ),
    )


@once.once()
def _files(root: str, suffixes: tuple[str, ...]) -> tuple[str, ...]:
  """List the files under root, relative, with forward slashes, sorted."""
  return _listing(root, lambda p: p.suffix.lower() in suffixes)


@once.once()
def _frame_folders(root: str) -> tuple[str, ...]:
  """List the folders under root that hold images."""
  return _listing(
    root,
    lambda p: (
      p.is_dir()
      and any(c.suffix.lower() in video.IMAGE_SUFFIXES for c in p.iterdir())
    ),
  )


def _listing(root: str, keep) -> tuple[str, ...]:
  base = pathlib.Path(root)
  if not base.is_dir():
    raise ValueError(f'data.source.root: no such folder: {root}')
  return tuple(
    sorted(p.relative_to(base).as_posix() for p in base.rglob('*') if keep(p))
  )


@functools.lru_cache(8)
def _classes(paths: tuple[str, ...]) -> tuple[str, ...]:
  return tuple(sorted({p.split('/')[0] for p in paths if '/' in p}))


def _folder_label(name: str, path: str, classes: tuple[str, ...]) -> dict:
  if not name:
    return {}
  if '/' not in path:
    raise video.LabelError(path, f'bad {name}: not inside a class folder')
  return {name: classes.index(path.split('/')[0])}
