"""Define what evaluations hand to the report, and keep it in one json a file.

A file `<name>.json` in the folder of results holds one `Results`: numbers, and
the pictures behind them. Whatever evaluates something writes one with `save`;
the report reads the whole folder with `load_folder`.
"""

import dataclasses
import json
import math
import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import typeguard

from vfm_jax.evals import store

Unit = Literal['fraction', 'percent', 'plain']
Centric = Literal['appearance', 'motion']
Task = Literal['lp', 'ap', 'knn', 'tal', 'stal', 'tas', 'other']

_FORMAT = 1


class ReportDataError(ValueError):
  """Say which result is wrong, and how."""


@dataclasses.dataclass(frozen=True)
class Metric:
  """Hold one number and how it came about.

  Attributes:
    name: of the number, as an evaluator names it: `ssv2_attentive16_top1`.
    value: the number, or the mean over `runs`.
    protocol: how it was measured, in words; stands in the table.
    spread: sample standard deviation over `runs`; None for a single run.
    runs: number of runs behind `value`.
    unit: `fraction` (of 1) is shown in percent.
    task: table of published numbers that it stands beside.
    benchmark: column of that table, as `evals.published` spells it; None where
      no published number is comparable.
    centric: what a benchmark of one's own asks for, `appearance` or `motion`:
      its axis in a plane of such benchmarks. None for no axis.
  """

  name: str
  value: float
  protocol: str
  spread: float | None = None
  runs: int = 1
  unit: Unit = 'fraction'
  task: Task = 'other'
  benchmark: str | None = None
  centric: Centric | None = None

  def __post_init__(self):
    _require(bool(self.name), 'a metric needs a name')
    path = f'metric {self.name!r}'
    _require(
      math.isfinite(self.value), f'{path}: not finite, found {self.value}'
    )
    _require(
      self.runs >= 1, f'{path}: runs must be 1 or more, found {self.runs}'
    )
    _require(
      self.spread is None or (math.isfinite(self.spread) and self.spread >= 0),
      f'{path}: spread must be finite and >= 0, found {self.spread}',
    )
    _require(
      self.unit in get_args(Unit),
      f'{path}: unit must be one of {get_args(Unit)}, found {self.unit!r}',
    )
    _require(
      self.task in get_args(Task),
      f'{path}: task must be one of {get_args(Task)}, found {self.task!r}',
    )


@dataclasses.dataclass(frozen=True)
class Confusion:
  """Count which class was taken for which.

  Attributes:
    name: what was classified and how.
    classes: names of the C classes.
    counts: [C][C] counts; row: truth, column: prediction.
  """

  name: str
  classes: Sequence[str]
  counts: Sequence[Sequence[int]]

  def __post_init__(self):
    c = len(self.classes)
    shape = [len(row) for row in self.counts]
    _require(
      c > 0 and shape == [c] * c,
      f'confusion {self.name!r}: expected {c} rows of {c} counts, one a class, '
      f'found rows of {shape}',
    )
    _require(
      all(n >= 0 for row in self.counts for n in row),
      f'confusion {self.name!r}: a count is negative',
    )


@dataclasses.dataclass(frozen=True)
class EmbeddingMap:
  """Place videos in a plane.

  Attributes:
    name: of the map: data set and method, as in `K400, t-SNE`.
    points: [n] pairs (x, y).
    labels: [n] class of each video, a place in `classes`.
    classes: names of the classes.
    ids: [n] names of the videos, shown when hovered over.
    note: how the map was made; may be empty.
  """

  name: str
  points: Sequence[Sequence[float]]
  labels: Sequence[int]
  classes: Sequence[str]
  ids: Sequence[str]
  note: str = ''

  def __post_init__(self):
    path = f'embedding map {self.name!r}'
    lengths = (len(self.points), len(self.labels), len(self.ids))
    _require(
      lengths[0] > 0 and len(set(lengths)) == 1,
      f'{path}: expected as many points, labels and ids, found {lengths}',
    )
    _require(
      all(len(p) == 2 and all(map(math.isfinite, p)) for p in self.points),
      f'{path}: points must be finite pairs (x, y)',
    )
    top = len(self.classes)
    _require(
      all(0 <= y < top for y in self.labels),
      f'{path}: labels must lie in [0, {top}), the number of classes',
    )


@dataclasses.dataclass(frozen=True)
class Segment:
  """Hold a labelled stretch of a video.

  Attributes:
    start: of it, in the unit of the timeline.
    end: after it; larger than `start`.
    label: name of its class.
    score: confidence of a prediction; None for truth and for segmentations.
  """

  start: float
  end: float
  label: str
  score: float | None = None

  def __post_init__(self):
    _require(
      math.isfinite(self.start)
      and math.isfinite(self.end)
      and self.end > self.start,
      f'segment {self.label!r}: expected a finite start before its end, found '
      f'{self.start} to {self.end}',
    )


@dataclasses.dataclass(frozen=True)
class Timeline:
  """Set predicted segments of a video against the true ones.

  Attributes:
    name: of the video.
    length: of the video, in `unit`.
    unit: `s` or `frames`.
    truth: true segments; they may overlap.
    predicted: predicted segments, the best first.
    note: number of this video, as in `F1@50 0.91`; may be empty.
  """

  name: str
  length: float
  truth: Sequence[Segment]
  predicted: Sequence[Segment]
  unit: Literal['s', 'frames'] = 's'
  note: str = ''

  def __post_init__(self):
    _require(
      math.isfinite(self.length) and self.length > 0,
      f'timeline {self.name!r}: length must be > 0, found {self.length}',
    )


@dataclasses.dataclass(frozen=True)
class Results:
  """Hold what one evaluation of one model says.

  Attributes:
    title: heading in the report: data set and task, as in `THUMOS14, TAL`.
    model: name of the encoder; all results of a model are one point.
    metrics: numbers.
    confusions: pictures of which class is taken for which.
    maps: embeddings in the plane.
    timelines: predictions against the truth.
    note: what a reader must know of the data; may be empty.
  """

  title: str
  model: str
  metrics: Sequence[Metric] = ()
  confusions: Sequence[Confusion] = ()
  maps: Sequence[EmbeddingMap] = ()
  timelines: Sequence[Timeline] = ()
  note: str = ''

  def __post_init__(self):
    _require(bool(self.title and self.model), 'results need a title and model')


def save(
  folder: str | os.PathLike, name: str, results: Results
) -> pathlib.Path:
  """Write results to `<folder>/<name>.json`; return the file.

  A reader sees the whole file or none.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  out = folder / f'{name}.json'
  content = {'format': _FORMAT, **dataclasses.asdict(results)}
  text = json.dumps(content, allow_nan=False, default=_plain)
  store.replace(out, lambda f: f.write(text.encode()))
  return out


def load(path: str | os.PathLike) -> Results:
  """Read one file.

  Raises:
    ReportDataError: it is no such file; the message names it.
  """
  try:
    content = json.loads(pathlib.Path(path).read_text())
  except (OSError, ValueError) as e:
    raise ReportDataError(f'{path}: unreadable json: {e}') from e
  if not isinstance(content, dict) or content.pop('format', None) != _FORMAT:
    raise ReportDataError(
      f'{path}: expected results with "format": {_FORMAT}, as '
      'evals.report_data.save writes them'
    )
  try:
    return _make(Results, content)
  except (ReportDataError, TypeError, typeguard.TypeCheckError) as e:
    raise ReportDataError(f'{path}: {e}') from e


def load_folder(folder: str | os.PathLike) -> list[Results]:
  """Read all `*.json` of a folder, by name; none if there is no folder."""
  return [load(p) for p in sorted(pathlib.Path(folder).glob('*.json'))]


def merge(results: Sequence[Results]) -> list[Results]:
  """Make one of the results with the same title and model: runs of one thing.

  A metric that several of them have becomes mean and spread over their values;
  pictures are those of the first.
  """
  groups: dict[tuple[str, str], list[Results]] = {}
  for r in results:
    groups.setdefault((r.title, r.model), []).append(r)
  out = []
  for first, *rest in groups.values():
    metrics: dict[str, list[Metric]] = {}
    for r in (first, *rest):
      for m in r.metrics:
        metrics.setdefault(m.name, []).append(m)
    merged = [_pool(ms) for ms in metrics.values()]
    out.append(dataclasses.replace(first, metrics=tuple(merged)))
  return out


def _pool(metrics: Sequence[Metric]) -> Metric:
  if len(metrics) == 1:
    return metrics[0]
  values = [m.value for m in metrics]
  return dataclasses.replace(
    metrics[0],
    value=statistics.fmean(values),
    spread=statistics.stdev(values),
    runs=len(values),
  )


# Fields that hold several of a class.
_PARTS: Mapping[type, Mapping[str, type]] = {
  Results: {
    'metrics': Metric,
    'confusions': Confusion,
    'maps': EmbeddingMap,
    'timelines': Timeline,
  },
  Timeline: {'truth': Segment, 'predicted': Segment},
}


def _make(cls: Any, content: Any) -> Any:
  """Build a dataclass and its parts from parsed json, checking types."""
  if not isinstance(content, dict):
    raise ReportDataError(f'expected {cls.__name__}, found {content!r:.80}')
  fields = {f.name: f.type for f in dataclasses.fields(cls)}
  if unknown := sorted(set(content) - set(fields)):
    raise ReportDataError(f'{cls.__name__} has no {", ".join(unknown)}')
  parts = _PARTS.get(cls, {})
  values = {}
  for name, value in content.items():
    if name in parts:
      typeguard.check_type(value, list)
      value = tuple(_make(parts[name], v) for v in value)
    else:
      typeguard.check_type(value, fields[name])
    values[name] = value
  return cls(**values)


def _plain(value: Any) -> Any:
  """Turn numpy numbers and arrays into what json knows."""
  if hasattr(value, 'tolist'):
    return value.tolist()
  raise TypeError(f'{type(value).__name__} is nothing that json knows')


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise ReportDataError(message)
