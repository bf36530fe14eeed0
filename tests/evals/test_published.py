import itertools

import pytest

from vfm_jax.evals import published

ROWS = [(t, r) for t in published.tables() for r in t.rows]
AVERAGED = [(t, r) for t, r in ROWS if r.average is not None]


@pytest.mark.parametrize(
  ('table', 'row'),
  AVERAGED,
  ids=[f'{t.task} {r.model} {r.arch}' for t, r in AVERAGED],
)
def test_averages_recompute_but_for_the_flagged_one(table, row):
  found = published.mean(row, table.averaged)
  if row.average.doubt:
    assert found == pytest.approx(67.48, abs=0.005)
    assert '67.48' in row.average.doubt
    assert row.average.value == 66.88
  else:
    assert found == pytest.approx(row.average.value, abs=0.0051)


def test_every_printed_row_is_there():
  counts = {t.task: len(t.rows) for t in published.tables()}
  assert counts == dict(lp=12, ap=17, knn=9, tal=8, stal=8, tas=8)
  assert len(AVERAGED) == 24
  assert sum(len(r.cells) for _, r in ROWS) == (
    12 * 6 + 12 * 6 + 4 * 3 + 4 + 9 * 6 + 8 * 4 + 12 + 8 + 8 * 9
  )


def test_marks_are_those_of_the_report():
  seen = {
    (t.task, r.model, r.arch, c)
    for t, r in ROWS
    for c, cell in r.cells.items()
    if cell.seen
  }
  probes = {
    (task, model, arch, 'SSv2')
    for task, (model, arch) in itertools.product(
      ('lp', 'ap'),
      [
        ('V-JEPA', 'L'),
        ('V-JEPA', 'H'),
        ('InternVideo2 s1', 'g'),
        ('InternVideo2 s2', 'g'),
        ('TWLV-I +SSv2', 'L'),
      ],
    )
  }
  mit = {
    (task, f'InternVideo2 {s}', 'g', 'MiT')
    for task, s in itertools.product(('lp', 'ap'), ('s1', 's2'))
  }
  knn = {
    ('knn', 'V-JEPA', arch, f'SSv2 {bank}')
    for arch, bank in itertools.product('LH', ('uniform', 'clip', 'video'))
  }
  anet = {
    ('tal', 'InternVideo2', 'g', f'ANet {mode}')
    for mode in ('self-contained', 'external')
  }
  assert seen == probes | mit | knn | anet


def test_doubted_cells_are_the_ones_that_repeat_their_neighbour():
  doubted = [
    (r, c) for _, r in ROWS for c, cell in r.cells.items() if cell.doubt
  ]
  assert [(r.model, r.arch, c) for r, c in doubted] == [
    ('UMT s1', 'B', 'DV48'),
    ('UMT s2', 'B', 'DV48'),
  ]
  for row, column in doubted:
    assert row.cells[column].value == row.cells['SSv2'].value


def test_numbers_sit_in_their_columns():
  lp, ap, knn = (published.table(t) for t in ('lp', 'ap', 'knn'))
  twlv = next(r for r in lp.rows if (r.model, r.arch) == ('TWLV-I', 'L'))
  assert twlv.cells['DV48'].value == 32.84
  assert twlv.cells['IN-1K'].value == 72.98
  prism = next(r for r in ap.rows if r.model == 'VideoPrism')
  assert prism.quoted
  assert {c: x.value for c, x in prism.cells.items()} == {
    'K400': 87.2, 'MiT': 45.5, 'SSv2': 68.5, 'DV48': 71.3
  }  # fmt: skip
  mae = next(r for r in ap.rows if r.model == 'VideoMAE')
  assert {c: x.value for c, x in mae.cells.items()} == {
    'K400': 77.8, 'SSv2': 65.5, 'IN-1K': 71.1
  }  # fmt: skip
  assert knn.rows[0].cells['SSv2 clip'].value == 12.46
  detail = next(r for r in published.table('tal').rows if len(r.cells) > 4)
  assert (detail.model, detail.arch) == ('TWLV-I', 'L')
  assert detail.cells['THUMOS14 external@0.5'].value == 55.54
  assert detail.cells['ANet self-contained@0.75'].value == 36.07
  with pytest.raises(KeyError):
    published.table('captions')
