"""Write the report: one HTML file that needs nothing but a browser.

It shows what evaluations found (`evals/report_data.py`) beside the published
numbers of the TWLV-I report (`evals/published.py`). Style and script are within
the file, and its content policy forbids every request.
"""

import importlib.resources
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from vfm_jax.evals import published, report_figures, report_plane, store
from vfm_jax.evals.html import Html, el, join
from vfm_jax.evals.report_data import (
  Metric,
  ReportDataError,
  Results,
  merge,
)
from vfm_jax.evals.report_planes import NO_AXES, Axes

_POLICY = (
  "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
  'img-src data:'
)


def write(
  path: str | os.PathLike,
  results: Sequence[Results],
  *,
  title: str = 'Evaluation of video encoders',
  axes: Axes = NO_AXES,
) -> pathlib.Path:
  """Write the page; return its file, which appears when it is complete.

  Args:
    path: of the page.
    results: what to show; those of several runs become mean and spread, see
      `report_data.merge`.
    title: of the page.
    axes: which of the numbers go on a plane of their own.

  Raises:
    ReportDataError: there are no results.
  """
  path = pathlib.Path(path)
  text = page(merge(results), title=title, axes=axes)
  path.parent.mkdir(parents=True, exist_ok=True)
  store.replace(path, lambda f: f.write(text.encode()))
  return path


def page(
  results: Sequence[Results], *, title: str, axes: Axes = NO_AXES
) -> str:
  """Return the page.

  Raises:
    ReportDataError: there are no results.
  """
  if not results:
    raise ReportDataError(
      'no results to report: expected files as evals.report_data.save writes '
      'them; evaluate something first'
    )
  sections = [
    ('plane', 'Appearance versus motion', _plane(results, axes)),
    ('numbers', 'Our numbers', _numbers(results)),
    ('published', 'Published numbers beside ours', _published(results)),
    ('confusions', 'Confusions', _each(results, _confusions)),
    ('maps', 'Embedding maps', _each(results, _maps)),
    ('timelines', 'Predictions over time', _each(results, _timelines)),
  ]
  sections = [s for s in sections if s[2]]
  links = [el('li', el('a', t, href=f'#{i}')) for i, t, _ in sections]
  models = ', '.join(dict.fromkeys(r.model for r in results))
  body = el(
    'body',
    el('a', 'Skip to the figures', href='#plane', class_='skip'),
    el(
      'header',
      el('h1', title),
      el('p', f'Models: {models}', class_='about'),
      el('nav', el('ul', *links), aria_label='Contents'),
    ),
    el(
      'main',
      *(
        el('section', el('h2', t), content, id=i) for i, t, content in sections
      ),
    ),
    el('div', id='tip', role='status', aria_live='polite', hidden=True),
    el('script', Html(_asset('report.js'))),
  )
  head = el(
    'head',
    Html('<meta charset="utf-8">'),
    Html(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
    Html('<meta name="viewport" content="width=device-width">'),
    # Browsers ask for an icon unless the page has one.
    Html('<link rel="icon" href="data:,">'),
    el('title', title),
    el('style', Html(_asset('report.css'))),
  )
  return f'<!doctype html>\n{el("html", head, body, lang="en")}\n'


def _asset(name: str) -> str:
  return importlib.resources.files('vfm_jax.evals').joinpath(name).read_text()


def _plane(results: Sequence[Results], axes: Axes) -> Html:
  about = el(
    'p',
    'Rightwards: what is told by the look of a scene. Upwards: what is told by '
    'how things move. ★ marks the models of this page.',
    class_='about',
  )
  return join(about, report_plane.overview(results, axes))


def _numbers(results: Sequence[Results]) -> Html | None:
  rows = [
    el(
      'tr',
      el('td', r.model),
      el('td', show(m)),
      el('td', str(m.runs)),
      el('td', el('code', m.name)),
      el('td', m.protocol),
    )
    for r in results
    for m in r.metrics
  ]
  if not rows:
    return None
  head = el('tr', *map(_th, ('model', 'value', 'runs', 'name', 'protocol')))
  notes = [
    el('p', f'{r.title}, {r.model}: {r.note}', class_='small')
    for r in results
    if r.note
  ]
  about = el(
    'p',
    'Mean ± sample standard deviation where there are several runs.',
    class_='about',
  )
  table = el('table', el('thead', head), el('tbody', *rows), class_='words')
  return join(about, el('div', table, class_='wide'), *notes)


def show(metric: Metric) -> str:
  """Return value and spread as they stand in a table."""
  unit = '' if metric.unit == 'plain' else ' %'
  factor = 100 if metric.unit == 'fraction' else 1
  digits = 2 if unit else 4
  text = f'{factor * metric.value:.{digits}f}'
  if metric.spread is not None:
    text += f' ± {factor * metric.spread:.{digits}f}'
  return text + unit


def _published(results: Sequence[Results]) -> Html:
  parts: list[Any] = [
    el(
      'p',
      'In percent. † the model saw this benchmark in pretraining; ? a printed '
      'number that we doubt. ★ ours.',
      class_='about',
    )
  ]
  for table in published.tables():
    columns = list(table.columns)
    rows = [_row(table, row, columns) for row in table.rows]
    rows += _our_rows(results, table, columns)
    averaged = ['average'] if table.averaged else []
    head = [_th(c) for c in ('model', 'size', *columns, *averaged)]
    drawn = el('table', el('thead', el('tr', *head)), el('tbody', *rows))
    parts += [
      el('h3', table.title),
      el('div', drawn, class_='wide', tabindex='0', role='region',
         aria_label=table.title),
      el('p', f'Published: {table.source} of arXiv:2408.11318.',
         class_='small'),
    ]  # fmt: skip
  return join(*parts)


def _row(table, row, columns) -> Html:
  cells = [_cell(row.cells.get(c)) for c in columns]
  if table.averaged:
    cells.append(_cell(row.average))
  quoted = ' (quoted)' if row.quoted else ''
  name = el('th', row.model + quoted, scope='row')
  return el('tr', name, el('td', row.arch), *cells)


def _our_rows(results, table, columns) -> list[Html]:
  found: dict[str, dict[str, Metric]] = {}
  for r in results:
    for m in r.metrics:
      if m.task == table.task and m.benchmark in columns:
        found.setdefault(r.model, {})[m.benchmark] = m
  rows = []
  for model, metrics in found.items():
    cells = [
      el('td', show(metrics[c]).removesuffix(' %') if c in metrics else '–')
      for c in columns
    ]
    if table.averaged:
      cells.append(el('td', '–'))
    name = el('th', model, scope='row')
    rows.append(el('tr', name, el('td'), *cells, class_='ours'))
  return rows


def _cell(cell: published.Cell | None) -> Html:
  if cell is None:
    return el('td', '–')
  text = f'{cell.value:.2f}' + '†' * cell.seen
  if cell.doubt:
    return el('td', el('abbr', f'{text}?', title=cell.doubt))
  return el('td', text)


def _each(
  results: Sequence[Results], draw: Callable[[Results], list[Html]]
) -> Html | None:
  parts = []
  for r in results:
    if figures := draw(r):
      parts.append(el('h3', f'{r.title} · {r.model}'))
      parts.append(el('div', *figures, class_='figures'))
  return join(*parts) if parts else None


def _confusions(r: Results) -> list[Html]:
  return [report_figures.confusion(c) for c in r.confusions]


def _maps(r: Results) -> list[Html]:
  return [report_figures.embedding_map(m) for m in r.maps]


def _timelines(r: Results) -> list[Html]:
  colours = report_figures.class_colours(r.timelines)
  return [report_figures.timeline(t, colours) for t in r.timelines]


def _th(text: str) -> Html:
  return el('th', text, scope='col')
