"""Check evaluations over a store, as the `eval` verb runs them."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from vfm_jax.evals import store
from vfm_jax.evals.knn import KNN
from vfm_jax.evals.linear import LinearProbe
from vfm_jax.evals.outcome import Outcome
from vfm_jax.evals.report_data import load_folder
from vfm_jax.evals.stored import StoredEvaluation, StoredEvaluator, StoredSet
from vfm_jax.evals.stored_probes import StoredProbe

CLASSES = 3
REPO = pathlib.Path(__file__).parents[2]


def write_set(root, dataset, sampling, clips, seed=0):
  """Write a set as the published archives have it: fewer keys in the json."""
  rng = np.random.default_rng(seed)
  for split, count in (('train', 12), ('val', 6)):
    folder = store.split_folder(root, dataset, split, sampling)
    folder.mkdir(parents=True)
    for i in range(count):
      y = i % CLASSES
      x = 4 * np.eye(5)[y] + 0.1 * rng.normal(size=(clips, 5))
      np.save(folder / f'{split}{i}_c.npy', x.astype(np.float32))
      video = x.mean(0, keepdims=sampling == 'uniform')
      np.save(folder / f'{split}{i}_v.npy', video.astype(np.float32))
      meta = {'annotation': str(y), 'duration': 3.0, 'num_frames': 90}
      (folder / f'{split}{i}.json').write_text(json.dumps(meta))


@pytest.fixture
def root(tmp_path):
  write_set(tmp_path, 'Kinetics400', 'uniform', 1)
  write_set(tmp_path, 'Kinetics400', 'multi-clip', 2)
  write_set(tmp_path, 'ours', None, 2)
  return tmp_path


def evaluation(root, dataset='Kinetics400', **evaluators):
  return StoredEvaluation(str(root), dataset, evaluators, model='tiny')


KNN3 = StoredProbe(KNN(k=3))


def test_numbers_carry_their_protocol_and_are_written(root, tmp_path):
  clip = StoredProbe(KNN(k=3), sampling='multi-clip', rows='clip')
  linear = LinearProbe(lr=0.1, fit_batch=True, epochs=10, warmup_epochs=1)
  probes = dict(
    uniform=KNN3,
    clip=clip,
    mixed=dataclasses.replace(clip, train_rows='video'),
    linear=StoredProbe(linear, seeds=(0, 1)),
  )
  assert all(isinstance(p, StoredEvaluator) for p in probes.values())
  out = tmp_path / 'run'
  numbers = evaluation(root, **probes).run(out)
  assert numbers == {
    'uniform/Kinetics400_uniform_video_knn3_top1': 1.0,
    'clip/Kinetics400_multi-clip_clip_knn3_top1': 1.0,
    'mixed/Kinetics400_multi-clip_video-to-clip_knn3_top1': 1.0,
    'linear/Kinetics400_uniform_video_offline_linear10ep_top1': 1.0,
  }
  saved = {r.title: r for r in load_folder(out / 'results')}
  assert len(saved) == 4
  metric = saved['Kinetics400, linear'].metrics[0]
  assert (metric.runs, metric.spread) == (2, 0.0)
  knn = saved['Kinetics400, uniform']
  assert knn.model == 'tiny'
  # All classes of the published set, though the tiny one has three.
  assert len(knn.confusions[0].classes) == 400
  assert np.diag(knn.confusions[0].counts)[:4].tolist() == [2, 2, 2, 0]


def test_published_protocols_name_their_column():
  def column(dataset, **kwargs):
    return StoredProbe(**kwargs)._benchmark(dataset)

  clip = dict(sampling='multi-clip', rows='clip')
  assert column('Kinetics400') == 'K400 uniform'
  assert column('sthsth-v2', **clip) == 'SSv2 clip'
  assert column('Kinetics400', sampling='multi-clip') == 'K400 video'
  assert column('Kinetics400', probe=KNN(k=20)) is None
  assert column('Kinetics400', probe=LinearProbe()) is None
  assert column('Kinetics400', train_rows='clip') is None
  assert column('Diving48') is None  # the report's kNN table has two sets
  assert column('ours') is None
  assert StoredProbe(KNN(bank_batch=1024, temperature=0.5)).metric_name(
    'a'
  ) == ('a_uniform_video_knn200_t0.5_bank1024_top1')


def test_a_set_knows_what_it_has(root):
  assert StoredSet(str(root), 'Kinetics400').samplings() == [
    'uniform',
    'multi-clip',
  ]
  assert StoredSet(str(root), 'ours').samplings() == [None]
  assert StoredSet(str(root), 'Kinetics400').class_bound == 400
  assert StoredSet(str(root), 'Kinetics400', 3).class_bound == 3
  assert StoredSet(str(root), 'ours').class_bound is None
  flat = StoredProbe(KNN(k=3), sampling=None)
  got = evaluation(root, 'ours', knn=flat).run(root / 'run')
  assert got == {'knn/ours_video_knn3_top1': 1.0}


@pytest.mark.parametrize(
  ('suffix', 'content', 'message'),
  [
    ('_v.npy', b'\x93NUMPY half', 'unreadable array'),
    ('_c.npy', np.zeros((0, 5), np.float32), 'M >= 1'),
    ('_c.npy', np.full((1, 5), np.nan, np.float32), 'NaN'),
    ('_c.npy', None, 'unreadable array'),
    ('.json', b'{"annotation": 400}', r'in \[0, 400\), found 400'),
    ('.json', b'{"annotation": -1}', r'in \[0, 400\), found -1'),
    ('.json', b'{"annot', 'unreadable json'),
    ('.json', b'{}', "no label 'annotation'"),
  ],
)
def test_errors_name_the_file_and_nothing_is_written(
  root, suffix, content, message
):
  bad = store.split_folder(root, 'Kinetics400', 'val', 'uniform')
  bad = bad / f'val2{suffix}'
  if content is None:
    bad.unlink()
  elif isinstance(content, bytes):
    bad.write_bytes(content)
  else:
    np.save(bad, content)
  with pytest.raises(store.StoreError, match=message) as e:
    evaluation(root, knn=KNN3).run(root / 'run')
  assert str(bad) in str(e.value)
  assert not (root / 'run').exists()


def test_a_finished_evaluator_keeps_its_result_when_the_next_one_fails(root):
  missing = StoredProbe(KNN(k=3), label='mood')
  with pytest.raises(store.StoreError, match="no label 'mood'"):
    evaluation(root, knn=KNN3, other=missing).run(root / 'run')
  assert [p.name for p in (root / 'run/results').iterdir()] == [
    'Kinetics400-knn.json'
  ]


def test_an_outcome_that_is_not_finite_is_refused(root):
  @dataclasses.dataclass(frozen=True)
  class Broken:
    def run_stored(self, data, *, seed, mesh=None):
      from vfm_jax.evals.report_data import Metric

      return Outcome(metrics=(Metric('x', float('nan'), 'none'),))

  with pytest.raises(ValueError, match='not finite'):
    evaluation(root, broken=Broken()).run(root / 'run')
  with pytest.raises(ValueError, match='evaluators is empty'):
    evaluation(root)


def test_clips_are_read_without_what_temporal_tasks_lack(root):
  folder = store.split_folder(root, 'ours', 'val', None)
  (folder / 'val0_v.npy').unlink()
  (folder / 'val0.json').write_text('{"duration": 2.0, "annotation": [[1]]}')
  got = StoredSet(str(root), 'ours').split('val', None).read_clips('val0')
  assert got.clips.shape == (2, 5)
  assert (got.duration, got.num_frames, got.video) == (2.0, None, None)


@pytest.mark.slow
def test_eval_verb_over_a_store(root, tmp_path):
  """The archives drop in: a root and a data set are all that is said."""
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'vfm_jax.main', 'eval'),
      f'--config={REPO}/configs/eval_store.py:multi-clip',
      f'--config.root={root}',
      '--config.evaluators.knn.probe.k=3',
      '--config.evaluators.knn_clip.probe.k=3',
      '--config.evaluators.linear.probe.batch=12',
      '--config.evaluators.linear_clip.probe.batch=12',
      f'--workdir={tmp_path}/run',
    ],
    capture_output=True,
    text=True,
    cwd=REPO,
  )
  assert done.returncode == 0, done.stderr
  numbers = json.loads(done.stdout)
  assert numbers['knn_clip/Kinetics400_multi-clip_clip_knn3_top1'] == 1.0
  assert len(numbers) == 4
  assert len(load_folder(tmp_path / 'run/results')) == 4
