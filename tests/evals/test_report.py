"""Check the page as text; `test_report_browser.py` opens it."""

import html.parser
import json
import re

import numpy as np
import pytest

from vfm_jax.evals import html as html_lib
from vfm_jax.evals import published, report, report_data, report_planes
from vfm_jax.evals.report_data import (
  Confusion,
  EmbeddingMap,
  Metric,
  ReportDataError,
  Results,
  Segment,
  Timeline,
)
from vfm_jax.evals.report_planes import Axes

NASTY = '</script><img src=x onerror=alert(1)>"\'&'


def metric(name, value, **kwargs):
  return Metric(name, value, f'protocol of {name}', **kwargs)


def results(model='ours', **kwargs):
  fields = dict(
    title='clips, kNN',
    model=model,
    metrics=(
      metric('a', 0.5, task='ap', benchmark='K400'),
      metric('b', 0.4, task='ap', benchmark='MiT'),
      metric('c', 0.6, task='ap', benchmark='SSv2', spread=0.03, runs=3),
      metric('d', 0.7, task='ap', benchmark='DV48', spread=0.04, runs=3),
      metric('loss', 1.25, unit='plain'),
    ),
    confusions=(Confusion('kNN', ('x', 'y'), ((3, 1), (0, 4))),),
    maps=(EmbeddingMap('PCA', ((0, 1), (2, 3)), (0, 1), ('x', 'y'), 'vw'),),
    timelines=(
      Timeline(
        'film', 9.5, (Segment(0, 2, 'x'),), (Segment(0.5, 2, 'x', 0.7),)
      ),
    ),
  )
  return Results(**{**fields, **kwargs})


class Outline(html.parser.HTMLParser):
  """Collect tags with their attributes, and see that they close in order."""

  VOID = ('meta', 'link', 'img')

  def __init__(self, text):
    super().__init__()
    self.tags, self.text, self.open = [], [], []
    self.feed(text)
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text.append(data)


def test_files_come_back_as_they_were(tmp_path):
  given = results(confusions=(), maps=(), note='n')
  path = report_data.save(tmp_path, 'a', given)
  assert report_data.load(path) == given
  assert report_data.load_folder(tmp_path) == [given]
  assert report_data.load_folder(tmp_path / 'none') == []
  # numpy comes back as plain numbers.
  y = np.arange(2)
  arrays = EmbeddingMap('m', np.eye(2), y, ('x', 'y'), ('v', 'w'))
  path = report_data.save(tmp_path, 'b', results(maps=(arrays,)))
  assert report_data.load(path).maps[0].points == [[1, 0], [0, 1]]


@pytest.mark.parametrize(
  ('text', 'what'),
  [
    ('{', 'unreadable json'),
    ('[]', '"format": 1'),
    ('{"title": "t"}', '"format": 1'),
    ('{"format": 1, "title": "t", "model": "m", "metric": []}', 'no metric'),
    ('{"format": 1, "title": 3, "model": "m"}', 'int'),
    ('{"format": 1, "title": "t"}', 'model'),
    ('{"format": 1, "title": "t", "model": "m", "maps": {}}', 'list'),
    (
      '{"format": 1, "title": "t", "model": "m", "metrics": '
      '[{"name": "a", "value": NaN, "protocol": "p"}]}',
      "metric 'a': not finite",
    ),
    (
      '{"format": 1, "title": "t", "model": "m", "confusions": '
      '[{"name": "a", "classes": ["x"], "counts": [[1, 2]]}]}',
      "confusion 'a'",
    ),
    (
      '{"format": 1, "title": "t", "model": "m", "timelines": [{"name": "v", '
      '"length": 5, "truth": [{"start": 2, "end": 1, "label": "x"}], '
      '"predicted": []}]}',
      "segment 'x': expected a finite start before its end",
    ),
  ],
)
def test_a_wrong_file_is_named_with_its_fault(tmp_path, text, what):
  path = tmp_path / 'r.json'
  path.write_text(text)
  with pytest.raises(ReportDataError, match=re.escape(what)) as e:
    report_data.load(path)
  assert str(path) in str(e.value)


def test_runs_of_a_model_become_mean_and_spread():
  runs = [results(metrics=(metric('m', v),)) for v in (0.2, 0.4, 0.9)]
  other = results('other', metrics=(metric('m', 0.1),))
  merged, alone = report_data.merge([*runs, other])
  (m,) = merged.metrics
  assert (m.value, m.runs) == (pytest.approx(0.5), 3)
  assert m.spread == pytest.approx(np.std([0.2, 0.4, 0.9], ddof=1))
  assert report.show(m) == '50.00 ± 36.06 %'
  assert alone == other


def test_elements_escape_all_text():
  out = html_lib.el('p', NASTY, html_lib.el('b', '<'), None, title=NASTY)
  (p, attrs), (b, _) = Outline(out).tags
  assert (p, b, attrs['title']) == ('p', 'b', NASTY)
  assert Outline(out).text == [NASTY, '<']
  kept = html_lib.data('i', {'k': NASTY})
  assert kept.count('</script>') == 1
  inside = kept.removeprefix('<script type="application/json" id="i">')
  assert json.loads(inside.removesuffix('</script>')) == {'k': NASTY}
  assert html_lib.el('a', x=1.23456, y=2.0, on=True, off=False) == (
    '<a x="1.23" y="2" on></a>'
  )


def test_page_is_whole_and_asks_for_nothing(tmp_path):
  path = report.write(tmp_path / 'deep' / 'r.html', [results()], title=NASTY)
  text = path.read_text()
  outline = Outline(text)
  assert "default-src 'none'" in text
  for tag, attrs in outline.tags:
    assert tag not in ('iframe', 'object', 'base')
    for name in ('src', 'href', 'action'):
      assert attrs.get(name, '#').startswith(('#', 'data:')), (tag, attrs)
  style, script = (report._asset(f'report.{kind}') for kind in ('css', 'js'))
  assert style in text
  assert script in text
  assert 'url(' not in style
  assert 'import' not in style + script
  links = [a['href'] for t, a in outline.tags if t == 'a']
  ids = [a['id'] for _, a in outline.tags if 'id' in a]
  assert len(ids) == len(set(ids))
  assert {link[1:] for link in links} <= set(ids)
  assert path.stat().st_mode & 0o444 == 0o444


def test_nothing_a_user_writes_becomes_markup():
  evil = results(
    NASTY,
    title=NASTY,
    note=NASTY,
    metrics=(
      Metric(NASTY, 0.5, NASTY, task='ap', benchmark='K400'),
      Metric(f'1{NASTY}', 0.5, NASTY, centric='appearance'),
      Metric(f'2{NASTY}', 0.5, NASTY, centric='motion'),
    ),
    confusions=(Confusion(NASTY, (NASTY,), ((3,),)),),
    maps=(EmbeddingMap(NASTY, ((0, 1),), (0,), (NASTY,), (NASTY,), NASTY),),
    timelines=(Timeline(NASTY, 3, (Segment(0, 2, NASTY),), (), note=NASTY),),
  )
  text = report.page([evil], title=NASTY)
  tags = Outline(text).tags
  assert not [t for t, _ in tags if t == 'img']
  assert not [a for _, attrs in tags for a in attrs if a.startswith('on')]
  assert len([t for t, _ in tags if t == 'script']) == 1 + text.count(
    'application/json'
  )


def test_every_published_number_stands_in_the_page():
  text = report.page([results()], title='t')
  for table in published.tables():
    for row in table.rows:
      for cell in row.cells.values():
        assert f'>{cell.value:.2f}{"†" * cell.seen}' in text
  assert 'printed equal to the cell of SSv2' in text
  assert '66.88?' in text


def test_figures_have_text_beside_them():
  tags = Outline(report.page([results()], title='t')).tags
  drawings = [a for t, a in tags if t == 'svg']
  assert len(drawings) == 5 + 3
  for attrs in drawings:
    assert attrs['tabindex'] == '0'
    assert attrs['aria-label']
  assert len([t for t, _ in tags if t == 'details']) == len(drawings)
  tips = [a['data-tip'] for _, a in tags if 'data-tip' in a]
  assert 'x taken for y: 1 of 4 (25.0 %)' in tips
  assert 'v\nx' in tips
  assert 'x\n0.50 – 2.00 s\nscore 0.7' in tips


def test_planes_set_ours_beside_the_published_rows():
  planes = {p.title: p for p in report_planes.planes([results()], Axes())}
  plane = planes['Attentive probe']
  x, y = plane.default
  (ours,) = [p for p in plane.points if p.ours]
  assert ours.spots[x].value == pytest.approx(45)
  assert ours.spots[y].value == pytest.approx(65)
  assert ours.spots[y].spread == pytest.approx(2.5)
  vjepa = next(p for p in plane.points if p.label == 'V-JEPA H')
  assert vjepa.spots[y].value == pytest.approx((72.48 + 80.41) / 2)
  assert vjepa.spots[y].mark == '†'
  linear = planes['Linear probe, encoder in the loop']
  umt = next(p for p in linear.points if p.label == 'UMT s1 B')
  assert umt.spots[y].mark == '?'
  rows = sum(len(published.table(t).rows) for t in ('ap', 'lp'))
  rows += 3 * len(published.table('knn').rows)
  shown = [q for p in planes.values() for q in p.points if not q.ours]
  assert len(shown) == rows


def test_names_say_which_benchmarks_go_on_a_plane_of_ours():
  def of(model, *values):
    names = ('scene_knn20_top1', 'direction_knn20_top1', 'scene_linear_top1')
    found = [metric(n, v) for n, v in zip(names, values, strict=True)]
    return results(model, metrics=tuple(found))

  both = [of('p', 0.1, 0.2, 0.3), of('q', 0.4, 0.5, 0.6)]
  assert len(report_planes.planes(both, Axes())) == 5
  plane = report_planes.planes(both, Axes('scene', 'direction'))[-1]
  assert plane.title == 'Our benchmarks: knn20_top1'
  assert plane.default == ('scene', 'direction')
  q = plane.points[1]
  assert (q.label, q.spots['direction'].value) == ('q', 50)


def test_nothing_to_show_is_an_error(tmp_path):
  with pytest.raises(ReportDataError, match='no results'):
    report.write(tmp_path / 'r.html', [])
  assert not list(tmp_path.iterdir())
