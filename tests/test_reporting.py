"""Check the verb `report`: from stored embeddings to a page."""

import dataclasses
import functools
import pathlib

import numpy as np
import pytest

from vfm_jax import config, reporting, train
from vfm_jax.data import augment, clips
from vfm_jax.data.synthetic import MovingShapes
from vfm_jax.evals import report_data, store
from vfm_jax.evals.knn import KNN
from vfm_jax.evals.multi_view import MultiView
from vfm_jax.evals.report_data import Metric, ReportDataError, Results
from vfm_jax.evals.stored import StoredEvaluation
from vfm_jax.evals.stored_probes import StoredProbe


def stored(root, model='enc'):
  """Write a store whose classes lie apart; return its evaluation."""
  rng = np.random.default_rng(0)
  for split, count in (('train', 12), ('val', 6)):
    folder = store.split_folder(root, 'Diving48', split, 'uniform')
    for i in range(count):
      x = np.eye(3)[None, i % 3] + 0.01 * rng.normal(size=(1, 3))
      store.write(folder, store.Embedding(f'v{i}', x, annotation=i % 3))
  probe = StoredProbe(probe=KNN(k=3))
  return StoredEvaluation(str(root), 'Diving48', {'knn': probe}, model=model)


def test_a_store_becomes_a_page(tmp_path):
  page = reporting.write(
    stored(tmp_path / 'store'), str(tmp_path / 'run'), model='unused'
  )
  assert page == tmp_path / 'run' / 'report.html'
  text = page.read_text()
  assert 'Diving48' in text
  assert 'enc' in text
  assert '100.00 %' in text
  assert 'Confusions' in text
  (found,) = report_data.load_folder(tmp_path / 'run' / 'results')
  assert found.metrics[0].value == 1.0


def test_runs_stand_side_by_side_and_seeds_are_pooled(tmp_path):
  for run, values in dict(a0=0.4, a1=0.6, b=0.9).items():
    metric = Metric('scene_top1', values, 'p')
    folder = tmp_path / run / 'results'
    report_data.save(folder, 'r', Results('clips', run, (metric,)))
  runs = [(n[0], str(tmp_path / n)) for n in ('a0', 'a1', 'b')]
  page = reporting.write(None, str(tmp_path / 'out'), model='', runs=runs)
  text = page.read_text()
  assert '50.00 ± 14.14 %' in text
  assert '90.00 %' in text
  missing = [('c', str(tmp_path / 'c'))]
  with pytest.raises(ReportDataError, match=r"run 'c'; change --runs"):
    reporting.write(None, str(tmp_path / 'out'), model='', runs=missing)


def test_without_results_nothing_is_written(tmp_path):
  with pytest.raises(ReportDataError, match='no results'):
    reporting.write(None, str(tmp_path), model='m')
  assert not (tmp_path / 'report.html').exists()


@pytest.mark.slow
def test_a_checkpoint_is_evaluated_on_everything(tmp_path):
  recipe = pathlib.Path(__file__).parent / 'recipes/tiny_classify.py'
  c = config.load(str(recipe))
  c.steps = 2
  exp = config.build(c)
  videos = dataclasses.replace(
    exp.data.train,
    clip=functools.partial(clips.uniform, frames=4),
    transform=functools.partial(augment.center_crop, size=16),
  )
  held_out = dataclasses.replace(
    videos,
    source=MovingShapes(count=16, frames=8, size=24, directions=4, seed=1),
  )
  exp = dataclasses.replace(
    exp,
    embed={'train': videos, 'val': held_out},
    evals={'test': MultiView(held_out, 'direction', batch_size=8)},
  )
  train.train(exp, str(tmp_path), config=c)
  page = reporting.write(exp, str(tmp_path), model='tiny')
  text = page.read_text()
  names = [
    'direction_views1_top1',
    'knn20_top1',
    'offline_linear',
    't-SNE',
    'LDA',
  ]
  for name in names:
    assert name in text
  titles = {r.title for r in report_data.load_folder(tmp_path / 'results')}
  assert len(titles) == 1 + 3 * len(videos.source.label_names)
