"""Hold the published numbers of the TWLV-I report (arXiv:2408.11318).

Top-1 in percent unless a table says otherwise. † marks a benchmark whose videos
the model saw in pretraining, as the report prints it; ? a number that we doubt,
with the reason in `DOUBTS`.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Literal

Task = Literal['lp', 'ap', 'knn', 'tal', 'stal', 'tas']
Centric = Literal['appearance', 'motion']

# What a benchmark of action recognition asks for, by the report's division.
CENTRIC: Mapping[str, Centric] = {
  'K400': 'appearance',
  'MiT': 'appearance',
  'SSv2': 'motion',
  'DV48': 'motion',
}

# Why a number marked ? is doubted, by (task, model, arch, column).
DOUBTS: Mapping[tuple[str, str, str, str], str] = {
  ('lp', 'UMT s1', 'B', 'DV48'): 'printed equal to the cell of SSv2',
  ('lp', 'UMT s2', 'B', 'DV48'): 'printed equal to the cell of SSv2',
  (
    'ap',
    'TWLV-I +SSv2',
    'L',
    'average',
  ): 'the five printed numbers have a mean of 67.48',
}

ARCHITECTURES = ('B', 'L', 'H', 'g')


@dataclasses.dataclass(frozen=True)
class Cell:
  """Hold one number of a table.

  Attributes:
    value: the number, in percent.
    seen: the model saw videos of this benchmark in pretraining (†).
    doubt: why we doubt the number; empty for one that we don't.
  """

  value: float
  seen: bool = False
  doubt: str = ''


@dataclasses.dataclass(frozen=True)
class Row:
  """Hold a row of a table.

  Attributes:
    model: name, with s1 or s2 for its first or second training stage.
    arch: size letter.
    cells: by column; columns that are not printed are missing.
    average: the mean that is printed, over `Table.averaged`.
    quoted: the report takes the row over from the model's own paper.
  """

  model: str
  arch: str
  cells: Mapping[str, Cell]
  average: Cell | None = None
  quoted: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
  """Hold a table of the report.

  Attributes:
    task: short name.
    title: what it holds.
    source: its number in the report.
    columns: names of the numbers.
    averaged: columns that the printed average is over; () for no average.
    rows: the models.
  """

  task: Task
  title: str
  source: str
  columns: tuple[str, ...]
  averaged: tuple[str, ...]
  rows: tuple[Row, ...]


_RECOGNITION = ('K400', 'MiT', 'SSv2', 'DV48', 'EK')

# A line is: model | arch | number of each column [| average]; - is not printed.
_LP = """
UMT s1          | B | 66.17 26.87  17.46  17.46? 35.38 70.84 | 32.67
UMT s2          | B | 69.47 29.79  18.22  18.22? 37.41 74.75 | 34.62
TWLV-I          | B | 74.17 30.59  37.19  30.41  42.05 61.14 | 42.88
UMT s1          | L | 74.50 32.87  24.74  22.69  37.37 76.05 | 38.43
UMT s2          | L | 76.60 35.69  31.02  21.42  39.81 79.24 | 40.91
V-JEPA          | L | 70.77 28.83  52.50† 22.86  45.34 56.67 | 44.06
TWLV-I          | L | 80.17 36.29  46.41  32.84  47.34 72.98 | 48.61
DFN             | H | 77.99 37.27  26.28  27.36  38.07 84.55 | 41.39
V-JEPA          | H | 70.75 28.95  53.41† 29.34  47.30 58.26 | 45.95
InternVideo2 s1 | g | 78.20 38.47† 26.18† 25.13  37.09 79.78 | 41.01
InternVideo2 s2 | g | 81.81 40.52† 40.13† 23.71  42.69 80.06 | 45.77
TWLV-I +SSv2    | L | 80.73 37.19  48.14† 31.07  46.58 73.64 | 48.74
"""

_AP = """
UMT s1          | B | 74.32 33.12  51.64  48.88 54.76 78.16 | 52.54
UMT s2          | B | 74.15 33.80  50.30  38.93 52.74 79.83 | 49.98
TWLV-I          | B | 77.66 35.06  58.74  66.70 58.31 70.27 | 59.29
UMT s1          | L | 81.50 39.25  58.68  56.60 57.91 82.64 | 58.79
UMT s2          | L | 80.70 39.39  55.53  45.38 55.70 83.71 | 55.34
V-JEPA          | L | 80.19 38.06  70.53† 74.72 62.34 73.60 | 65.17
TWLV-I          | L | 84.46 41.23  68.95  74.98 63.70 79.19 | 66.66
DFN             | H | 81.96 41.30  45.03  62.18 51.85 87.54 | 56.46
V-JEPA          | H | 80.75 39.60  72.48† 80.41 63.94 73.49 | 67.44
InternVideo2 s1 | g | 83.96 42.39† 61.76† 64.01 59.04 85.77 | 62.23
InternVideo2 s2 | g | 84.39 43.18† 61.54† 51.88 56.87 85.28 | 59.57
TWLV-I +SSv2    | L | 84.54 42.00  71.12† 74.57 65.17 80.84 | 66.88?
"""

_AP_QUOTED = """
VideoMAE   | L | 77.8 -    65.5 -    - 71.1
MVD        | L | 79.4 -    66.5 -    - 73.3
Hiera      | L | 75.5 -    64.2 -    - 68.9
OmniMAE    | L | 65.6 -    60.6 -    - 75.1
VideoPrism | g | 87.2 45.5 68.5 71.3 - -
"""

_KNN = """
UMT s2       | B | 50.95 55.76 54.64 12.00  12.46  11.92
TWLV-I       | B | 57.51 63.64 62.59 19.82  19.67  18.48
UMT s2       | L | 60.68 64.68 63.76 14.47  14.76  14.24
V-JEPA       | L | 39.95 47.62 46.00 25.82† 25.93† 23.23†
TWLV-I       | L | 65.97 70.82 69.88 19.47  19.73  19.11
DFN          | H | 63.78 68.07 66.97 15.30  16.21  15.62
V-JEPA       | H | 34.46 42.45 40.68 24.67† 24.90† 21.54†
InternVideo2 | g | 76.15 79.43 78.46 22.65  23.38  22.86
TWLV-I +SSv2 | L | 67.83 72.14 71.21 21.99  22.33  21.94
"""

_TAL = """
UMT          | B | 40.34 41.66 29.86  37.73
TWLV-I       | B | 54.83 52.05 32.34  38.56
UMT          | L | 49.43 47.31 34.07  38.70
V-JEPA       | L | 49.72 52.11 28.22  37.99
TWLV-I       | L | 58.75 53.63 34.98  39.49 \
73.61 61.21 38.40 66.83 55.54 35.88 52.96 36.07 7.88 59.56 40.47 9.06
DFN          | H | 48.17 43.21 35.33  38.36
V-JEPA       | H | 49.91 51.54 26.18  38.46
InternVideo2 | g | 66.21 55.81 38.35† 40.82†
"""

_STAL = """
UMT          | B | 21.88
TWLV-I       | B | 20.50
UMT          | L | 26.38
V-JEPA       | L | 22.57
TWLV-I       | L | 27.39
DFN          | H | 23.41
V-JEPA       | H | 22.59
InternVideo2 | g | 28.68
"""

_TAS = """
UMT          | B | 70.66 70.79 77.71 80.75 83.22 75.92 31.39 43.75 32.39
TWLV-I       | B | 80.69 76.93 85.83 88.26 87.70 82.94 52.18 62.77 57.86
UMT          | L | 71.20 69.23 76.60 85.91 87.62 79.69 45.25 58.11 49.04
V-JEPA       | L | 60.85 61.17 70.30 87.42 86.84 81.63 46.96 58.63 52.66
TWLV-I       | L | 80.60 77.19 84.75 88.43 90.19 82.29 50.66 62.80 54.17
DFN          | H | 73.22 71.56 80.13 88.06 89.66 80.16 41.73 55.47 46.40
V-JEPA       | H | 54.73 56.51 63.25 84.87 85.49 80.82 45.55 57.07 51.92
InternVideo2 | g | 82.00 79.04 86.74 92.96 93.08 84.76 57.38 66.98 62.38
"""


@functools.cache
def tables() -> tuple[Table, ...]:
  """Return the tables of the report, in its order."""
  recognition = (*_RECOGNITION, 'IN-1K')
  knn = [f'{d} {w}' for d in ('K400', 'SSv2') for w in _BANKS]
  return (
    Table(
      'lp',
      'Linear probe, top-1',
      'Table 3',
      recognition,
      _RECOGNITION,
      _rows('lp', _LP, recognition),
    ),
    Table(
      'ap',
      'Attentive probe, top-1',
      'Table 5',
      recognition,
      _RECOGNITION,
      _rows('ap', _AP, recognition)
      + _rows('ap', _AP_QUOTED, recognition, quoted=True),
    ),
    _plain('knn', 'kNN classification, top-1', 'Table 6', tuple(knn), _KNN),
    _plain(
      'tal',
      'Temporal action localisation, mAP',
      'Tables 9 and 10',
      (*_TAL_AVERAGES, *_TAL_DETAILS),
      _TAL,
    ),
    _plain(
      'stal',
      'Spatio-temporal action localisation, frame AP at IoU 0.5',
      'the table of STAL',
      ('AVA',),
      _STAL,
    ),
    _plain(
      'tas',
      'Temporal action segmentation; mF1 is the mean of F1 at 10, 25 and 50 %',
      'the table of TAS',
      tuple(
        f'{d} {m}'
        for d in ('50Salads', 'GTEA', 'Breakfast')
        for m in ('mF1', 'edit', 'accuracy')
      ),
      _TAS,
    ),
  )


def table(task: str) -> Table:
  """Return one table.

  Raises:
    KeyError: the report has no table of this task.
  """
  return {t.task: t for t in tables()}[task]


_BANKS = ('uniform', 'clip', 'video')
_TAL_AVERAGES = (
  'THUMOS14 self-contained',
  'THUMOS14 external',
  'ANet self-contained',
  'ANet external',
)
_TAL_DETAILS = tuple(
  f'{name}@{at}'
  for name, thresholds in zip(
    _TAL_AVERAGES,
    ((0.3, 0.5, 0.7),) * 2 + ((0.5, 0.75, 0.95),) * 2,
    strict=True,
  )
  for at in thresholds
)


def _plain(task, title, source, columns, text) -> Table:
  return Table(task, title, source, columns, (), _rows(task, text, columns))


def _rows(task, text, columns, quoted=False) -> tuple[Row, ...]:
  out = []
  for line in text.strip().splitlines():
    model, arch, numbers, *average = (p.strip() for p in line.split('|'))
    values = numbers.split()
    cell = functools.partial(_cell, task, model, arch)
    cells = {
      column: cell(column, value)
      # Rows may end before the last columns do.
      for column, value in zip(columns, values, strict=False)
      if value != '-'
    }
    mean = cell('average', average[0]) if average else None
    out.append(Row(model, arch, cells, mean, quoted))
  return tuple(out)


def _cell(task, model, arch, column, text) -> Cell:
  doubt = DOUBTS[task, model, arch, column] if text.endswith('?') else ''
  return Cell(float(text.rstrip('†?')), '†' in text, doubt)


def mean(row: Row, columns: tuple[str, ...]) -> float:
  """Return the mean of the given columns; nan if one is not printed."""
  if any(c not in row.cells for c in columns):
    return math.nan
  return math.fsum(row.cells[c].value for c in columns) / len(columns)
