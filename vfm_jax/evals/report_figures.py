"""Draw confusions, embedding maps and temporal predictions as SVG.

Every drawn thing says in `data-tip` what it is, for the pointer and the arrow
keys; every figure is followed by a table with the same in words.
"""

import math
from collections.abc import Mapping, Sequence

from vfm_jax.evals.html import Html, el
from vfm_jax.evals.report_data import (
  Confusion,
  EmbeddingMap,
  Segment,
  Timeline,
)

# Classes whose names fit along the sides of a confusion.
_NAMED = 30
# Rows of a table under a figure.
_LISTED = 20
_COLOURS = 10
_LANES = 6


def confusion(item: Confusion) -> Html:
  """Draw the shares of each true class that were taken for each class."""
  c = len(item.classes)
  named = c <= _NAMED
  side = 14 * c if 20 <= c <= _NAMED else max(200, min(24 * c, 560))
  cell = side / c
  longest = max(map(len, item.classes))
  left = min(170, 14 + 6.4 * min(longest, 24)) if named else 30
  top = left if named else 30
  cells, wrong = [], []
  for i, row in enumerate(item.counts):
    total = sum(row)
    for j, n in enumerate(row):
      if not n:
        continue
      share = n / total
      text = (
        f'{item.classes[i]} taken for {item.classes[j]}: {n} of {total} '
        f'({100 * share:.1f} %)'
      )
      if i != j:
        wrong.append((n, text))
      cells.append(
        el(
          'rect',
          x=left + j * cell,
          y=top + i * cell,
          width=cell,
          height=cell,
          fill_opacity=f'{0.08 + 0.92 * share:.3f}',
          class_='right' if i == j else 'wrong',
          data_tip=text,
        )
      )
  labels = []
  if named:
    for i, name in enumerate(item.classes):
      at, short = (i + 0.5) * cell, _short(name, 24)
      labels.append(
        el('text', short, x=left - 6, y=top + at + 4, class_='tick end')
      )
      x, y = left + at + 4, top - 6
      labels.append(
        el(
          'text',
          short,
          x=x,
          y=y,
          transform=f'rotate(-60 {x:.2f} {y:.2f})',
          class_='tick start',
        )
      )
  else:
    middle = side / 2
    labels = [
      el('text', 'predicted class', x=left + middle, y=20, class_='tick'),
      el(
        'text',
        'true class',
        x=18,
        y=top + middle,
        transform=f'rotate(-90 18 {top + middle:.2f})',
        class_='tick',
      ),
    ]
  right = sum(row[i] for i, row in enumerate(item.counts))
  total = sum(map(sum, item.counts))
  said = f'{right} of {total} right' if total else 'no examples'
  # Slanted names reach to the right of the last column.
  width = left + side + (0.5 * top if named else 12)
  svg = _svg(
    width,
    top + side + 8,
    [
      el('rect', x=left, y=top, width=side, height=side, class_='frame'),
      *labels,
      *cells,
    ],
    f'Confusion of {item.name}, {said}: rows are true classes, columns '
    'predicted ones.',
    'confusion',
  )
  wrong.sort(key=lambda w: -w[0])
  listed = [(text,) for _, text in wrong[:_LISTED]]
  return _figure(
    item.name,
    svg,
    f'{said}. Rows: truth; columns: prediction.',
    _table(('most frequent confusions',), listed or [('none',)]),
    'Confusions in words',
  )


def embedding_map(item: EmbeddingMap) -> Html:
  """Draw points in a plane, coloured by class."""
  width, height, margin = 640, 480, 18
  xs, ys = zip(*item.points, strict=True)
  px = _fit(xs, margin, width - margin)
  py = _fit(ys, height - margin, margin)
  radius = 4.5 if len(xs) <= 400 else 3.0 if len(xs) <= 2000 else 2.2
  dots = [
    el(
      'circle',
      cx=px(x),
      cy=py(y),
      r=radius,
      class_=f'dot c{label % _COLOURS}',
      data_class=label,
      data_tip=f'{name}\n{item.classes[label]}',
    )
    for x, y, label, name in zip(xs, ys, item.labels, item.ids, strict=True)
  ]
  frame = el('rect', width=width, height=height, class_='frame')
  svg = _svg(
    width,
    height,
    [frame, *dots],
    f'Embedding map {item.name}: {len(xs)} points of '
    f'{len(set(item.labels))} classes.',
    'map',
  )
  present = [k for k in range(len(item.classes)) if k in set(item.labels)]
  legend = el(
    'div',
    *(
      el(
        'button',
        el('span', class_=f'swatch c{k % _COLOURS}'),
        item.classes[k],
        type='button',
        aria_pressed='false',
        data_class=k,
      )
      for k in present
    ),
    class_='legend',
    role='group',
    aria_label='Show one class only',
  )
  rows = []
  for k in present:
    own = [i for i, y in enumerate(item.labels) if y == k]
    centre = (math.fsum(v[i] for i in own) / len(own) for v in (xs, ys))
    rows.append(
      (item.classes[k], len(own), ', '.join(f'{v:.3g}' for v in centre))
    )
  return _figure(
    item.name,
    el('div', svg, legend, class_='with-legend'),
    item.note,
    _table(('class', 'points', 'centre'), rows),
    'Classes and centres',
  )


def timeline(item: Timeline, colours: Mapping[str, int]) -> Html:
  """Draw the predicted segments of a video under the true ones.

  Args:
    item: the video.
    colours: place of each class in the palette.
  """
  width, left, lane = 860, 84, 22
  scale = (width - left - 12) / item.length
  truth, _ = _lanes(item.truth)
  predicted, hidden = _lanes(item.predicted)
  parts, y = [], 6
  for title, lanes in (('truth', truth), ('predicted', predicted)):
    parts.append(el('text', title, x=left - 8, y=y + 15, class_='tick end'))
    for segments in lanes or [[]]:
      bar = el(
        'rect',
        x=left,
        y=y + 1,
        width=item.length * scale,
        height=lane - 2,
        class_='lane',
      )
      parts.append(bar)
      parts += [
        _segment(s, item, colours, left, scale, y, lane) for s in segments
      ]
      y += lane
    y += 8
  for tick in _ticks(item.length):
    x = left + tick * scale
    parts.append(el('line', x1=x, x2=x, y1=y - 6, y2=y, class_='axis'))
    parts.append(el('text', f'{tick:g}', x=x, y=y + 13, class_='tick'))
  unit = 'seconds' if item.unit == 's' else 'frames'
  parts.append(el('text', unit, x=left - 8, y=y + 13, class_='tick end'))
  counts = f'{len(item.truth)} true and {len(item.predicted)} predicted'
  svg = _svg(
    width,
    y + 20,
    parts,
    f'Timeline of {item.name}: {counts} segments.',
    'timeline',
  )
  notes = [item.note] if item.note else []
  if hidden:
    notes.append(f'{hidden} overlapping predictions of lower rank not drawn')
  rows = [
    (kind, s.label, _span(s, item.unit), _score(s))
    for kind, segments in (
      ('true', item.truth),
      ('predicted', item.predicted[:_LISTED]),
    )
    for s in segments
  ]
  return _figure(
    item.name,
    svg,
    '; '.join(notes),
    _table(('', 'class', 'from – to', 'score'), rows),
    'Segments in words',
  )


def class_colours(timelines: Sequence[Timeline]) -> dict[str, int]:
  """Give each class of these timelines a place in the palette."""
  labels = sorted(
    {s.label for t in timelines for s in (*t.truth, *t.predicted)}
  )
  return {label: i % _COLOURS for i, label in enumerate(labels)}


def _segment(s: Segment, item, colours, left, scale, y, lane) -> Html:
  start, end = (min(max(v, 0.0), item.length) for v in (s.start, s.end))
  width = max((end - start) * scale, 1.0)
  shown = None
  room = int((width - 8) / 7.4)
  if room >= 3:
    shown = el(
      'text',
      _short(s.label, room),
      x=left + start * scale + 4,
      y=y + 15,
      class_='inside',
    )
  score = '' if s.score is None else f'\nscore {s.score:.3g}'
  return el(
    'g',
    el(
      'rect',
      x=left + start * scale,
      y=y + 1,
      width=width,
      height=lane - 2,
      class_='segment',
    ),
    shown,
    class_=f'c{colours[s.label]}',
    data_tip=f'{s.label}\n{_span(s, item.unit)}{score}',
  )


def _lanes(segments: Sequence[Segment]) -> tuple[list[list[Segment]], int]:
  """Put each segment in the first lane with room; return those left over."""
  lanes: list[list[Segment]] = []
  left_over = 0
  for s in segments:
    free = next(
      (
        lane
        for lane in lanes
        if all(s.start >= o.end or s.end <= o.start for o in lane)
      ),
      None,
    )
    if free is None and len(lanes) < _LANES:
      lanes.append(free := [])
    if free is None:
      left_over += 1
    else:
      free.append(s)
  return lanes, left_over


def _span(s: Segment, unit: str) -> str:
  if unit == 's':
    return f'{s.start:.2f} – {s.end:.2f} s'
  return f'{s.start:g} – {s.end:g} frames'


def _score(s: Segment) -> str:
  return '' if s.score is None else f'{s.score:.3g}'


def _ticks(length: float) -> list[float]:
  power = 10 ** math.floor(math.log10(length))
  step = next(s * power for s in (0.1, 0.2, 0.5, 1) if length / s / power <= 12)
  return [round(k * step, 6) for k in range(math.floor(length / step) + 1)]


def _fit(values: Sequence[float], start: float, end: float):
  low, high = min(values), max(values)
  if high == low:
    return lambda v: (start + end) / 2
  return lambda v: start + (v - low) / (high - low) * (end - start)


def _short(text: str, length: int) -> str:
  return text if len(text) <= length else text[: max(length - 1, 1)] + '…'


def _svg(width, height, parts, label: str, kind: str) -> Html:
  return el(
    'svg',
    *parts,
    viewBox=f'0 0 {width:.0f} {height:.0f}',
    style=f'max-width:{width:.0f}px',
    role='group',
    tabindex='0',
    class_=f'{kind} hoverable',
    aria_label=f'{label} Arrow keys go through its parts.',
  )


def _figure(title: str, drawing, note: str, table: Html, summary: str) -> Html:
  return el(
    'figure',
    el('h4', title),
    drawing,
    el('figcaption', note) if note else None,
    el('details', el('summary', summary), el('div', table, class_='wide')),
  )


def _table(head: Sequence[str], rows) -> Html:
  return el(
    'table',
    el('thead', el('tr', *(el('th', h, scope='col') for h in head))),
    el('tbody', *(el('tr', *(el('td', v) for v in row)) for row in rows)),
  )
