"""Draw the appearance-versus-motion planes of the report.

Each pair of columns can be chosen on the page; what is drawn here is the first
pair, with the places of all others for the script (`report.js`).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from vfm_jax.evals.html import Html, data, el, join
from vfm_jax.evals.report_data import Results
from vfm_jax.evals.report_planes import Axes, Plane, Point, planes

WIDTH, HEIGHT = 760, 520
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 20, 52


def overview(results: Sequence[Results], axes: Axes) -> Html:
  """Return all planes; the script shows the chosen one."""
  drawn = planes(results, axes)
  # The first one that has a point of ours, if any.
  first = next(
    (
      i
      for i, p in enumerate(drawn)
      if any(_on(q, *p.default) for q in p.points)
    ),
    0,
  )
  options = [
    el('option', p.title, value=f'plane-{i}', selected=i == first)
    for i, p in enumerate(drawn)
  ]
  chooser = el('label', 'Numbers ', el('select', *options, id='plane-choice'))
  figures = [draw(p, i) for i, p in enumerate(drawn)]
  return join(el('div', chooser, class_='choices'), *figures)


def _on(point: Point, x: str, y: str) -> bool:
  return point.ours and x in point.spots and y in point.spots


def draw(plane: Plane, number: int) -> Html:
  """Return the plane as a figure with its choices and a table."""
  scales = {axis: _scale(plane, axis) for axis in plane.axes}
  x, y = plane.default
  name = f'plane-{number}'
  marks = [_mark(p, i, x, y, scales) for i, p in enumerate(plane.points)]
  svg = el(
    'svg',
    el('g', *_grid(scales[x], scales[y]), class_='grid'),
    _axis_title('x', x),
    _axis_title('y', y),
    el('g', *(m for m in marks if m), class_='points'),
    viewBox=f'0 0 {WIDTH} {HEIGHT}',
    role='group',
    tabindex='0',
    class_='plane hoverable',
    aria_label=f'{plane.title}: {x} against {y}, a point a model. Arrow keys '
    'go through the points; the table below has the numbers.',
  )
  info = {
    'axes': {
      axis: {
        'ticks': [[t, s.place(t)] for t in s.ticks],
        'low': s.low,
        'high': s.high,
      }
      for axis, s in scales.items()
    },
    'points': [
      {
        'label': p.label,
        'ours': p.ours,
        'spots': {a: list(spot) for a, spot in p.spots.items()},
      }
      for p in plane.points
    ],
    'box': [_LEFT, _TOP, WIDTH - _RIGHT, HEIGHT - _BOTTOM],
  }
  chooser = el(
    'div',
    _select('x', 'Horizontal', plane.axes, x),
    _select('y', 'Vertical', plane.axes, y),
    class_='choices',
  )
  return el(
    'figure',
    el('h3', plane.title),
    chooser,
    svg,
    el('figcaption', plane.note) if plane.note else None,
    _table(plane),
    data(f'{name}-data', info),
    id=name,
    class_='plane-figure',
  )


class _Scale(NamedTuple):
  low: float
  high: float
  ticks: tuple[float, ...]

  def place(self, value: float) -> float:
    return (value - self.low) / (self.high - self.low)


def _scale(plane: Plane, axis: str) -> _Scale:
  values = [p.spots[axis] for p in plane.points if axis in p.spots]
  low = min((s.value - s.spread for s in values), default=0.0)
  high = max((s.value + s.spread for s in values), default=100.0)
  margin = max(0.08 * (high - low), 1.0)
  low, high = low - margin, high + margin
  step = next(
    s for s in (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0) if (high - low) / s <= 9
  )
  first = math.ceil(low / step)
  ticks = [k * step for k in range(first, math.floor(high / step) + 1)]
  return _Scale(low, high, tuple(ticks))


def _px(scale: _Scale, value: float) -> float:
  return _LEFT + scale.place(value) * (WIDTH - _LEFT - _RIGHT)


def _py(scale: _Scale, value: float) -> float:
  return HEIGHT - _BOTTOM - scale.place(value) * (HEIGHT - _TOP - _BOTTOM)


def _grid(x: _Scale, y: _Scale) -> list[Html]:
  bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
  out = []
  for t in x.ticks:
    at = _px(x, t)
    out.append(el('line', x1=at, x2=at, y1=_TOP, y2=bottom))
    out.append(el('text', f'{t:g}', x=at, y=bottom + 18, class_='tick'))
  for t in y.ticks:
    at = _py(y, t)
    out.append(el('line', x1=_LEFT, x2=right, y1=at, y2=at))
    label = el('text', f'{t:g}', x=_LEFT - 8, y=at + 4, class_='tick end')
    out.append(label)
  return out


def _axis_title(side: str, text: str) -> Html:
  middle = (_LEFT + WIDTH - _RIGHT) / 2
  if side == 'x':
    place = dict(x=middle, y=HEIGHT - 10)
  else:
    at = (_TOP + HEIGHT - _BOTTOM) / 2
    place = dict(x=16, y=at, transform=f'rotate(-90 16 {at:g})')
  return el('text', f'{text}, %', class_=f'axis-title {side}-title', **place)


def _mark(point, number, x, y, scales) -> Html:
  shown = x in point.spots and y in point.spots
  where = ''
  if shown:
    px = _px(scales[x], point.spots[x].value)
    py = _py(scales[y], point.spots[y].value)
    where = f'translate({px:.2f} {py:.2f})'
  colour, shape = point.family
  return el(
    'g',
    el('line', class_='whisker wx'),
    el('line', class_='whisker wy'),
    el('path', d=_PATHS[shape], class_='mark'),
    el('text', point.label, x='10', y='4', class_='label'),
    transform=where or None,
    visibility=None if shown else 'hidden',
    class_=f'point c{colour}' + (' ours' if point.ours else ''),
    data_number=number,
    data_tip=_tip(point, x, y) if shown else None,
  )


def _tip(point: Point, x: str, y: str) -> str:
  parts = []
  for axis in (x, y):
    s = point.spots[axis]
    spread = f' ± {s.spread:.2f}' if s.spread else ''
    parts.append(f'{axis}: {s.value:.2f}{s.mark}{spread}')
  return '\n'.join([point.label + (' (ours)' if point.ours else ''), *parts])


def _select(side: str, title: str, axes: Sequence[str], chosen: str) -> Html:
  options = [el('option', a, value=a, selected=a == chosen) for a in axes]
  return el('label', f'{title} ', el('select', *options, data_side=side))


def _table(plane: Plane) -> Html:
  head = el('tr', el('th', 'model', scope='col'), *(_th(a) for a in plane.axes))
  rows = []
  for p in plane.points:
    cells = []
    for a in plane.axes:
      s = p.spots.get(a)
      spread = f' ± {s.spread:.2f}' if s and s.spread else ''
      text = f'{s.value:.2f}{s.mark}{spread}' if s else '–'
      cells.append(el('td', text))
    name = el('th', p.label, scope='row')
    rows.append(el('tr', name, *cells, class_='ours' if p.ours else None))
  table = el('table', el('thead', head), el('tbody', *rows))
  return el(
    'details',
    el('summary', 'Numbers of this plane'),
    el('div', table, class_='wide'),
  )


def _th(text: str) -> Html:
  return el('th', text, scope='col')


_PATHS = {
  'circle': 'M-6 0a6 6 0 1 0 12 0a6 6 0 1 0 -12 0Z',
  'square': 'M-5.5 -5.5H5.5V5.5H-5.5Z',
  'triangle': 'M0 -7L6.5 5H-6.5Z',
  'down': 'M0 7L6.5 -5H-6.5Z',
  'pentagon': 'M0 -7L6.7 -2.2L4.1 5.7H-4.1L-6.7 -2.2Z',
  'diamond': 'M0 -7.5L6 0L0 7.5L-6 0Z',
  'cross': 'M-6 -2H-2V-6H2V-2H6V2H2V6H-2V2H-6Z',
  'star': 'M0 -10L2.6 -3.6L9.5 -3.1L4.3 1.4L5.9 8.1L0 4.5L-5.9 8.1L-4.3 1.4'
  'L-9.5 -3.1L-2.6 -3.6Z',
}
