"""Check the two commands that look into denoisers, in small."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from vfm_jax import comparison, comparison_report, config, train, verbs

pytestmark = pytest.mark.slow

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'


@pytest.fixture(autouse=True)
def _without_pictures_of_samples(monkeypatch):
  monkeypatch.setattr(train._Loop, '_draw', lambda *_: None)


def shrink(c):
  c.objective.denoiser.update(width=16, depth=1, heads=2)
  c.evals.levels.update(count=8, batch_size=8)
  c.update(steps=2, eval_every=1, log_every=1)
  c.optim.lr.warmup_steps = 1
  return c


def test_a_run_is_looked_into(tmp_path):
  c = shrink(config.load(f'{CONFIGS}/methods_digits.py:switch'))
  train.train(config.build(c), str(tmp_path))
  c = shrink(config.load(f'{CONFIGS}/analysis_digits.py:switch'))
  c.evals.affinity.update(levels=4, count=8, batch_size=8)
  c.evals.entropy.update(count=16, batch_size=8)
  found = verbs.evaluate(config.build(c), str(tmp_path))
  for start, count in (
    ('levels/loss8_', 20),
    ('convergence/steps90_', 20),
    ('entropy/entropy16_', 20),
    ('affinity/affinity_4x8_', 3),
    ('gates/', 4),
  ):
    assert sum(name.startswith(start) for name in found) == count
  pictures = {p.name for p in (tmp_path / 'evals').glob('*/*.png')}
  names = ('curves', 'entropy', 'affinity', 'routing')
  assert pictures == {f'{name}.png' for name in names}


def test_gaps_are_measured(tmp_path):
  c = config.load(f'{CONFIGS}/transfer_digits.py:')
  with c.unlocked():
    c.arms = (c.arms[0], c.arms[3])
    for arm in c.arms:
      shrink(arm.experiment)
  study, runs = config.build(c), str(tmp_path)
  outcomes = comparison.run(study, c, runs, (0,))
  text = comparison_report.write(study, outcomes, runs, (0,))
  low, high = study.arms[0].experiment.evals['levels'].intervals.bounds[2:4]
  row = next(
    x for x in text.splitlines() if x.startswith(f'| {low}-{high - 1}')
  )
  alone, together, gap = map(float, row.strip(' |').split(' | ')[1:])
  np.testing.assert_allclose(gap, alone - together, atol=2e-3)
  assert Image.open(tmp_path / 'study_gap.png').width > 300
