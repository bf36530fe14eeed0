"""Say which models lie where on the planes of the report.

A plane sets benchmarks that are told by appearance against benchmarks that are
told by motion, a point a model: the published ones of the TWLV-I report
(arXiv:2408.11318) and ours beside them, and planes of benchmarks of one's own.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vfm_jax.evals import published
from vfm_jax.evals.report_data import Metric, Results

# Marks by family of models: place in the palette and outline.
_FAMILIES = {
  'TWLV-I': (0, 'circle'),
  'V-JEPA': (1, 'square'),
  'UMT': (2, 'triangle'),
  'InternVideo2': (3, 'down'),
  'DFN': (4, 'pentagon'),
}
_OTHER = (5, 'cross')
_OURS = (6, 'star')
# Of models on planes of one's own.
_SHAPES = ('circle', 'square', 'triangle', 'diamond', 'down', 'pentagon')


class Spot(NamedTuple):
  """Hold where a model lies on an axis.

  Attributes:
    value: in percent.
    mark: † and ? as printed, of all cells behind the value.
    spread: sample standard deviation in percent; 0 for none.
  """

  value: float
  mark: str = ''
  spread: float = 0.0


class Point(NamedTuple):
  """Hold a model of a plane.

  Attributes:
    label: its name.
    family: place in the palette and outline of its mark.
    ours: it is no published row.
    spots: by axis; axes that it was not measured on are missing.
  """

  label: str
  family: tuple[int, str]
  ours: bool
  spots: Mapping[str, Spot]


@dataclasses.dataclass(frozen=True)
class Plane:
  """Hold a plane.

  Attributes:
    title: which numbers it shows.
    axes: names of the columns.
    default: the (x, y) that is shown first.
    points: the models.
    note: what a reader must know.
  """

  title: str
  axes: tuple[str, ...]
  default: tuple[str, str]
  points: tuple[Point, ...]
  note: str = ''


_TASKS = {'lp': 'linear probe', 'ap': 'attentive probe', 'knn': 'kNN'}


class Axes(NamedTuple):
  """Say which of one's own numbers ask for what, by their names.

  Attributes:
    appearance: regular expression found in names of numbers that are told by
      appearance, as in `scene`; '' for none.
    motion: the same for motion, as in `direction`.
  """

  appearance: str = ''
  motion: str = ''

  def side(self, metric: Metric) -> tuple[str, str, str] | None:
    """Return side, axis and plane of a metric; None if it is on no plane.

    Numbers are on one plane if their names differ in the match alone: one
    protocol.
    """
    if metric.benchmark is not None:
      return None
    for side, pattern in self._asdict().items():
      found = re.search(pattern, metric.name) if pattern else None
      if found:
        rest = metric.name[: found.start()] + metric.name[found.end() :]
        return side, found[0], rest.strip('_/ ')
    if metric.centric is not None:
      return metric.centric, metric.name, _TASKS.get(metric.task, metric.task)
    return None


NO_AXES = Axes()


def planes(results: Sequence[Results], axes: Axes) -> list[Plane]:
  """Return the planes of the report, then those of benchmarks of one's own."""
  out = [
    _recognition('ap', 'Attentive probe', results),
    _recognition('lp', 'Linear probe, encoder in the loop', results),
  ]
  for bank in ('uniform', 'clip', 'video'):
    pair = (f'K400 {bank}', f'SSv2 {bank}')
    points = [
      Point(_label(row), _family(row.model), False, _cells(row, pair))
      for row in published.table('knn').rows
    ]
    points += _ours(results, 'knn', pair)
    note = 'Weighted kNN, k = 200. ' + _DAGGER
    out.append(Plane(f'kNN, {bank}', pair, pair, tuple(points), note))
  return out + _own(results, axes)


_DAGGER = (
  '† the model saw this benchmark in pretraining; ? a printed number that we '
  'doubt.'
)
_MEANS = {
  f'{name} (mean of {", ".join(columns)})': columns
  for name in ('appearance', 'motion')
  if (columns := tuple(c for c, v in published.CENTRIC.items() if v == name))
}


def _recognition(task: str, title: str, results: Sequence[Results]) -> Plane:
  table = published.table(task)
  axes = (*_MEANS, *table.columns)
  points = [
    Point(
      _label(row),
      _family(row.model),
      False,
      _cells(row, table.columns) | _means(_cells(row, table.columns)),
    )
    for row in table.rows
  ]
  points += [
    p._replace(spots={**p.spots, **_means(p.spots)})
    for p in _ours(results, task, table.columns)
  ]
  x, y = _MEANS
  note = f'Published: {table.source} of the report. {_DAGGER}'
  return Plane(title, axes, (x, y), tuple(points), note)


def _label(row: published.Row) -> str:
  return f'{row.model} {row.arch}' + (' (quoted)' if row.quoted else '')


def _family(model: str) -> tuple[int, str]:
  return next((f for n, f in _FAMILIES.items() if model.startswith(n)), _OTHER)


def _cells(row: published.Row, columns: Sequence[str]) -> dict[str, Spot]:
  return {
    c: Spot(cell.value, '†' * cell.seen + '?' * bool(cell.doubt))
    for c, cell in row.cells.items()
    if c in columns
  }


def _means(spots: Mapping[str, Spot]) -> dict[str, Spot]:
  out = {}
  for name, columns in _MEANS.items():
    if all(c in spots for c in columns):
      parts = [spots[c] for c in columns]
      marks = ''.join(p.mark for p in parts)
      out[name] = Spot(
        math.fsum(p.value for p in parts) / len(parts),
        ''.join(m for m in '†?' if m in marks),
        # Of a mean of independent numbers.
        math.hypot(*(p.spread for p in parts)) / len(parts),
      )
  return out


def _ours(
  results: Sequence[Results], task: str, columns: Sequence[str]
) -> list[Point]:
  spots: dict[str, dict[str, Spot]] = {}
  for r in results:
    for m in r.metrics:
      at = m.benchmark
      if m.task == task and at is not None and at in columns:
        spots.setdefault(r.model, {})[at] = _spot(m)
  return [Point(model, _OURS, True, s) for model, s in spots.items()]


def _spot(metric: Metric) -> Spot:
  factor = 100.0 if metric.unit == 'fraction' else 1.0
  return Spot(factor * metric.value, '', factor * (metric.spread or 0.0))


def _own(results: Sequence[Results], axes: Axes) -> list[Plane]:
  """Return the planes of numbers with no published column."""
  sides: dict[str, dict[str, dict[str, None]]] = {}
  spots: dict[str, dict[str, dict[str, Spot]]] = {}
  for r in results:
    for m in r.metrics:
      found = axes.side(m)
      if found is not None:
        side, axis, plane = found
        sides.setdefault(plane, {}).setdefault(side, {})[axis] = None
        spots.setdefault(plane, {}).setdefault(r.model, {})[axis] = _spot(m)
  return [
    Plane(
      f'Our benchmarks: {plane}',
      (*names['appearance'], *names['motion']),
      (next(iter(names['appearance'])), next(iter(names['motion']))),
      tuple(
        Point(model, (i % 10, _SHAPES[i % len(_SHAPES)]), True, s)
        for i, (model, s) in enumerate(spots[plane].items())
      ),
      'Not comparable with published numbers. Whiskers: one standard '
      'deviation.',
    )
    for plane, names in sides.items()
    if len(names) == 2
  ]
