"""Check that a comparison runs, goes on, survives failures and is reported."""

import dataclasses
import json
import pathlib
import types

import jax
import numpy as np
import pytest
from PIL import Image

from vfm_jax import (
  comparison,
  comparison_report,
  comparison_transfer,
  config,
  main,
  train,
)
from vfm_jax.comparison import Arm, Comparison, Outcome
from vfm_jax.experiment import Experiment, WarmStart
from vfm_jax.ops.intervals import Intervals
from vfm_jax.ops.strata import SoftInterval

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'


def load(variant=''):
  return config.load(f'{CONFIGS}/study_digits.py:{variant}')


def shrink(c):
  """Make the run of an arm one of two steps of a tiny network."""
  c.objective.denoiser.update(width=16, depth=1, heads=2, scan=False)
  c.objective.sampling.sampler.steps = '2'
  c.evals.levels.update(count=8, batch_size=8)
  c.evals.levels.intervals.bounds = (0, 500, 1000)
  c.update(batch_size=8, steps=2, eval_every=1, log_every=1)
  c.optim.lr.warmup_steps = 1
  return c


def small_study(tmp_path, whole):
  """Return the study with two of its arms, one going on from the other."""
  c = load()
  with c.unlocked():
    arms = {arm.name: arm for arm in c.arms}
    c.arms = (arms['dit'], arms['dmp'])
    for arm in c.arms:
      shrink(arm.experiment)
    c.measures.digits.update(count=8, batch_size=8, reference_count=8)
    c.measures.digits.features.size = 32
    c.measures.classes.update(count=8, batch_size=8, epochs=1)
    c.measures.classes.train.source.val_per_class = 496
    c.measures.classes.val.source.val_per_class = 1
    c.report = str(tmp_path / 'docs/report')
  study = config.build(c)
  if not whole:
    study = dataclasses.replace(study, measures={'digits': Norm()})
  return c, study


class Norm:
  """Stand in for what draws pictures, whose programs take long to compile."""

  def run(self, objective, params, *, seed, mesh=None):
    norm = sum(float(abs(x).sum()) for x in jax.tree.leaves(params))
    return {'frechet_of_8': norm, 'seed': float(seed)}


@pytest.mark.slow
@pytest.mark.parametrize('whole', [False, True])
def test_study_from_start_to_end(whole, tmp_path, monkeypatch):
  if not whole:
    monkeypatch.setattr(train._Loop, '_draw', lambda *_: None)
  c, small = small_study(tmp_path, whole)
  runs = str(tmp_path / 'runs')

  def study():
    outcomes = comparison.run(small, c, runs, (3,))
    return comparison_report.write(small, outcomes, runs, (3,))

  table = study()
  assert table == (tmp_path / 'docs/report.md').read_text()
  rows = [line.split(' | ') for line in table.splitlines() if ' done ' in line]
  assert [row[0] for row in rows] == ['| dit', '| dmp']
  assert [row[3] for row in rows] == ['2', '2 + 2']
  for row in rows:
    assert all(np.isfinite(float(x.replace(',', ''))) for x in row[4:-1])
  if whole:
    assert '`digits/frechet_efficientnet_lite0_32_8_val8`' in table
    assert 'In all runs `classes/classifier_top1`' in table
  else:
    assert '`digits/frechet_of_8`' in table
    assert 'In all runs `digits/seed` is 0.000.' in table
  assert Image.open(tmp_path / 'docs/report.png').width > 1000
  dit, dmp = (
    Outcome(
      **json.loads((tmp_path / f'runs/{a}/seed_3/outcome.json').read_text())
    )
    for a in ('dit', 'dmp')
  )
  assert dit.parameters == dit.trained
  # One block of 16 prompts of 16, the gate with its depth, the noise.
  assert dmp.trained == 16 * 16 + 16 * 16 + 16 + 16 + 16 * 16
  assert dmp.parameters - dmp.trained == dit.parameters
  text = (tmp_path / 'runs/dmp/seed_3/config.txt').read_text()
  assert f"warm_start.workdir = '{runs}/dit/seed_3'" in text

  # What is done is kept, and not mixed with what another config gives.
  monkeypatch.setattr(train, 'train', None)
  assert study() == table
  c.arms[0].experiment.optim.clip_norm = 2.0
  with pytest.raises(ValueError, match="finished run of another config of 'd"):
    study()


def test_verbs(tmp_path, recipe, monkeypatch, capsys, parsed_flags):
  small, c = compare(recipe, 'one')
  monkeypatch.setattr(main, '_CONFIG', types.SimpleNamespace(value=c))
  monkeypatch.setattr(
    main, '_WORKDIR', types.SimpleNamespace(value=str(tmp_path))
  )
  monkeypatch.setattr(main, '_SEEDS', types.SimpleNamespace(value=['0', '4']))
  monkeypatch.setattr(main, '_keep_compiled', lambda workdir: None)
  monkeypatch.setattr(config, 'build', lambda c: small)
  monkeypatch.setattr(comparison, 'run', lambda *args: args)
  monkeypatch.setattr(comparison_report, 'write', lambda *args: args[2:])
  main.main(['main', 'study'])
  assert capsys.readouterr().out == f"('{tmp_path}', [0, 4])\n"
  with pytest.raises(config.ConfigError, match=r'verb study; .* as in :one'):
    main.main(['main', 'sample'])


@pytest.fixture(scope='module')
def recipe():
  c = shrink(load('dit'))
  return c, config.build(c)


def compare(recipe, *names, **kwargs):
  """Return a comparison of equal arms, and its config."""
  c, exp = recipe
  arms = tuple(Arm(name, exp, note=f'note of {name}') for name in names)
  nodes = tuple(config.ConfigDict({'experiment': c}) for _ in names)
  return Comparison(arms, {}, **kwargs), config.ConfigDict(
    {'arms': nodes, 'measures': {}, 'measure_seed': 0}
  )


def test_failures_are_outcomes(recipe, tmp_path, monkeypatch, capsys):
  study, c = compare(recipe, 'good', 'wild', 'broken')
  called = []

  def fake(exp, workdir, *, config):
    name = pathlib.Path(workdir).parent.name
    called.append((name, exp.seed, config.seed))
    if name == 'wild':
      raise train.NonFiniteError('10 steps in a row')
    if name == 'broken':
      raise TypeError('no such thing')

  monkeypatch.setattr(train, 'train', fake)
  monkeypatch.setattr(
    Experiment,
    'restore',
    lambda self, *_: types.SimpleNamespace(step=2, params={}, ema={'0.99': {}}),
  )
  out = comparison.run(study, c, str(tmp_path), (0, 5))
  assert [s for _, s, _ in called] == [s for *_, s in called] == [0, 5] * 3
  states = {name: [o.state for o in found] for name, found in out.items()}
  assert states == {
    'good': ['done', 'done'],
    'wild': ['diverged', 'diverged'],
    'broken': ['failed', 'failed'],
  }
  assert out['wild'][0].message == '10 steps in a row'
  assert 'TypeError: no such thing' in capsys.readouterr().err

  # Only what failed is tried again.
  called.clear()
  again = comparison.run(study, c, str(tmp_path), (0, 5))
  assert [name for name, *_ in called] == ['broken', 'broken']
  assert (again['good'], again['wild']) == (out['good'], out['wild'])
  # Or what is to be measured by something else.
  called.clear()
  c.measure_seed = 1
  again = comparison.run(study, c, str(tmp_path), (0,))
  assert [name for name, *_ in called] == ['good', 'broken']
  assert again['good'][0].seconds > out['good'][0].seconds


def test_interruption_leaves_no_outcome(recipe, tmp_path, monkeypatch):
  study, c = compare(recipe, 'one')
  monkeypatch.setattr(train, 'train', lambda *_, **__: {})
  monkeypatch.setattr(
    Experiment, 'restore', lambda self, *_: types.SimpleNamespace(step=1)
  )
  with pytest.raises(comparison.Interrupted, match='at step 1 of 2; run the s'):
    comparison.run(study, c, str(tmp_path), (0,))
  assert not list(tmp_path.rglob('outcome.json'))


def write_run(folder, scale, steps=(0, 1, 2)):
  folder.mkdir(parents=True)
  rows = [{'step': 1, 'loss': 1.0}]
  for step in steps:
    low, high = scale / (1 + step), 2 * scale / (1 + step)
    rows.append(
      {'step': step, 'levels/loss8_0-499': low, 'levels/loss8_500-999': high}
    )
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  (folder / 'metrics.jsonl').write_text(text)


def test_report(recipe, tmp_path):
  study, _ = compare(
    recipe, 'base', 'wild', 'late', 'broken', distance='d/f', title='All'
  )
  warm = dataclasses.replace(
    recipe[1], warm_start=WarmStart('somewhere'), steps=2
  )
  late = Arm('late', warm, start='base')
  arms = (*study.arms[:2], late, study.arms[3])
  study = dataclasses.replace(study, arms=arms)
  done = Outcome('done', 'x', 'y', 2, 1000, 10, 30.0)
  outcomes = {arm.name: [] for arm in arms}
  for seed, scale in ((0, 3.0), (1, 6.0)):
    for name in ('base', 'late'):
      write_run(tmp_path / f'{name}/seed_{seed}', scale)
      measured = {'d/fd': 100 * scale, 'c/top1': 0.5}
      outcomes[name].append(dataclasses.replace(done, measured=measured))
    write_run(tmp_path / f'wild/seed_{seed}', scale, steps=(0, 1))
  wild = dataclasses.replace(done, state='diverged', message='10 steps.')
  broken = dataclasses.replace(done, state='failed', message='TypeError: no')
  outcomes |= {'wild': [wild, wild], 'broken': [broken, broken]}
  text = comparison_report.write(study, outcomes, str(tmp_path), (0, 1))
  assert text == (tmp_path / 'study.md').read_text()
  # Means of 1.5 x 3 / 3 and 1.5 x 6 / 3, and their deviation.
  row = '| 2.250 ± 1.061 | 450 ± 212 | 2 done |'
  assert f'| base | 1,000 | 10 | 2 {row}' in text
  assert f'| late | 1,000 | 10 | 2 + 2 {row}' in text
  assert '| wild | 1,000 | 10 | 2 | none | none | 2 diverged |' in text
  assert '| broken | 1,000 | 10 | 2 | none | none | 2 failed |' in text
  assert 'In all runs `c/top1` is 0.500.' in text
  assert '4.0 minutes' in text
  assert '- **wild**: note of wild' in text
  assert '- broken, seed 1: failed. TypeError: no' in text
  assert Image.open(tmp_path / 'study.png').width > 1000


def test_gap_of_clusters(recipe, tmp_path):
  clusters = Intervals((0, 500, 1000))

  def learns(times):
    exp = recipe[1]
    objective = dataclasses.replace(exp.objective, times=times)
    return dataclasses.replace(exp, objective=objective)

  only = [SoftInterval(i, clusters) for i in range(2)]
  assert comparison_transfer.cluster_of(learns(only[1])) == (500, 1000)
  for times in (None, dataclasses.replace(only[0], own=0.9)):
    assert comparison_transfer.cluster_of(learns(times)) is None
  arms = (
    Arm('all', recipe[1]),
    Arm('clean', learns(only[0])),
    Arm('noisy', learns(only[1])),
  )
  study = Comparison(arms, {})
  # Of the second seed only two of the runs are done.
  for seed, scales in ((0, (3.0, 6.0, 1.5)), (1, (3.0, 3.0, 3.0))):
    for arm, scale in zip(arms, scales, strict=True):
      late = (seed, arm.name) == (1, 'noisy')
      steps = (0, 1) if late else (0, 1, 2)
      write_run(tmp_path / f'{arm.name}/seed_{seed}', scale, steps)
  done = Outcome('done', 'x', 'y', 2, 1000, 10, 30.0)
  outcomes = {arm.name: [done, done] for arm in arms}
  text = comparison_report.write(study, outcomes, str(tmp_path), (0, 1))
  # Losses are scale / 3 in the clean half and twice as much in the other.
  assert '| 0-499 | 1.500 ± 0.707 | 1.000 ± 0.000 | 0.500 ± 0.707 |' in text
  assert '| 500-999 | 1.000 | 2.000 | -1.000 |' in text
  assert 'study_gap.png' in text
  assert Image.open(tmp_path / 'study_gap.png').width > 300
  other = SoftInterval(0, Intervals((0, 300, 1000)))
  study = Comparison((arms[0], Arm('clean', learns(other))), {})
  with pytest.raises(ValueError, match=r"arm 'clean', objective\.times: .*300"):
    comparison_report.write(study, outcomes, str(tmp_path), (0, 1))


def test_planes_of_arms_that_do_not_denoise(recipe, tmp_path):
  embeds = dataclasses.replace(recipe[1], evals={})
  study = Comparison(
    (Arm('one', embeds), Arm('other', embeds), Arm('broken', embeds)),
    {},
    levels=None,
    planes={'kNN': ('knn/look', 'knn/move'), 'linear': ('look', 'move')},
  )
  done = Outcome('done', 'x', 'y', 2, 1000, 10, 30.0)
  names = ('knn/look', 'knn/move', 'look', 'move')
  outcomes = {
    arm: [
      dataclasses.replace(done, measured=dict.fromkeys(names, start + seed))
      for seed in (0.1, 0.2)
    ]
    for arm, start in (('one', 0.0), ('other', 0.5))
  }
  failed = dataclasses.replace(done, state='failed', message='TypeError: no')
  outcomes['broken'] = [failed, failed]
  text = comparison_report.write(study, outcomes, str(tmp_path), (0, 1))
  assert 'held-out loss' not in text
  assert '| other | 1,000 | 10 | 2 | 0.650 ± 0.071 |' in text
  assert '![kNN, linear](study_plane.png)' in text
  assert not (tmp_path / 'study.png').exists()
  assert Image.open(tmp_path / 'study_plane.png').width > 800


def test_arms_must_fit(recipe):
  exp = recipe[1]
  with pytest.raises(ValueError, match=r"arms\.1\.name: there is another 'a'"):
    compare(recipe, 'a', 'a')
  with pytest.raises(ValueError, match='arms: expected at least one'):
    compare(recipe)
  with pytest.raises(ValueError, match=r"Difficulty .* named 'bins'.*levels"):
    compare(recipe, 'a', levels='bins')
  warm = dataclasses.replace(exp, warm_start=WarmStart('there'))
  with pytest.raises(ValueError, match=r"arms\.0\.start: .* \[\], found 'b'"):
    Comparison((Arm('a', warm, start='b'), Arm('b', exp)), {})
  with pytest.raises(ValueError, match=r"both or neither, found 'a' and None"):
    Comparison((Arm('a', exp), Arm('b', exp, start='a')), {})


def test_every_arm_of_the_digits_is_built():
  study = config.build(load())
  methods = config.load(f'{CONFIGS}/methods_digits.py:dit')
  assert config.to_text(load('dit')) == config.to_text(methods)
  arms = {arm.name: arm for arm in study.arms}
  assert len(arms) == 11
  batches = {arm.experiment.batch_size for arm in study.arms}
  steps = {
    study.steps_before(arm) + arm.experiment.total_steps for arm in study.arms
  }
  longer = arms['dmp'].experiment.total_steps
  first = arms['dit'].experiment.total_steps
  assert (len(batches), steps) == (1, {first, first + longer})
  assert arms['ft'].experiment.total_steps == longer
  frozen = {row.frozen for row in arms['dmp'].experiment.optimizer[1]}
  assert frozen == {True, False}


def test_measures_and_arms_are_changed_apart():
  c = load()
  c.measures.classes.train.source.val_per_class = 400
  assert {a.experiment.data.train.source.val_per_class for a in c.arms} == {50}
