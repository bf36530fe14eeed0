import dataclasses
import gzip
import json

import numpy as np
import pytest

from vfm_jax.evals import store
from vfm_jax.evals.store import StoreError
from vfm_jax.evals.stored import StoredEvaluation, StoredSet
from vfm_jax.evals.tal import Localization
from vfm_jax.evals.tal_data import Timing
from vfm_jax.evals.tal_decode import Decoding
from vfm_jax.evals.tal_train import HeadTraining
from vfm_jax.models.temporal_localization import TemporalDetector
from vfm_jax.models.temporal_pyramid import Pyramid

CLASSES = ('fall', 'jump')


def long_videos(root, *, train=48, val=16, steps=64, width=8):
  """Write a store and annotations of noisy videos with known actions."""
  rng = np.random.default_rng(0)
  signs = rng.normal(size=(len(CLASSES), width)).astype(np.float32)
  database = {}
  for i in range(train + val):
    split = 'train' if i < train else 'val'
    rows = int(rng.integers(steps - 16, steps + 1))
    x = 0.2 * rng.normal(size=(rows, width)).astype(np.float32)
    actions, at = [], int(rng.integers(1, 6))
    while at + 3 < rows:
      length = int(rng.integers(3, 16))
      label, end = int(rng.integers(len(CLASSES))), min(at + length, rows - 1)
      x[at : end + 1] += signs[label]
      # Row k has its middle at k seconds; edges lie between two of them.
      span = [at - 0.5, end + 0.5]
      actions.append(dict(segment=span, label=CLASSES[label]))
      at = end + int(rng.integers(3, 9))
    video = store.Embedding(f'v{i}', x, duration=float(rows))
    store.write(store.split_folder(root, 'toy', split), video)
    subset = 'training' if split == 'train' else 'validation'
    database[f'v{i}'] = dict(subset=subset, annotations=actions)
  path = root / 'toy.json'
  path.write_text(json.dumps({'database': database}))
  return str(path)


def localization(annotations, **changes):
  windows = (5, 5)
  settings = dict(
    annotations=annotations,
    detector=TemporalDetector(
      len(CLASSES),
      Pyramid(windows, width=32, heads=2, embed=1, stem=1, drop_path=0.0),
      head_width=32,
      head_layers=2,
    ),
    training=HeadTraining(
      lr=4e-3,
      epochs=22,
      warmup_epochs=2,
      batch=8,
      length=64,
      ranges=((0, 6), (6, 10_000)),
      ema=0.9,
    ),
    timing=Timing(clip_length=0.0, stride=1.0, max_steps=64),
    sampling=None,
    eval_batch=16,
  )
  return Localization(**{**settings, **changes})


def test_a_head_learns_to_find_known_actions(tmp_path):
  annotations = long_videos(tmp_path)
  evaluation = StoredEvaluation(
    root=str(tmp_path),
    dataset='toy',
    evaluators={'tal': localization(annotations)},
    seed=1,
  )
  numbers = evaluation.run(tmp_path / 'out')
  name = 'tal/toy_actionformer22ep_self-contained_last'
  assert numbers[f'{name}_map50'] >= 0.95
  assert numbers[f'{name}_map'] >= 0.9
  folder = tmp_path / 'out' / 'results'
  results = json.loads((folder / 'toy-tal.json').read_text())
  first, *_ = results['timelines']
  assert len(first['predicted']) >= len(first['truth']) > 0
  assert (folder / 'toy-tal-toy.png').read_bytes().startswith(b'\x89PNG')
  packed = (folder / 'toy-tal-detections.json.gz').read_bytes()
  found = json.loads(gzip.decompress(packed))['results']
  assert len(found) == 16
  best = max(found[first['name']], key=lambda d: d['score'])
  assert best['label'] in CLASSES
  assert 0 <= best['segment'][0] < best['segment'][1] <= first['length']


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
  root = tmp_path_factory.mktemp('store')
  return root, long_videos(root, train=4, val=2)


def run(root, evaluator):
  return evaluator.run_stored(StoredSet(str(root), 'toy'), seed=0)


def test_missing_features_are_named_or_skipped(tmp_path):
  annotations = long_videos(tmp_path, train=4, val=2)
  (tmp_path / 'toy' / 'val' / 'v5_c.npy').unlink()
  evaluator = localization(annotations)
  with pytest.raises(StoreError, match=r"v5_c\.npy: no features of 'v5'"):
    run(tmp_path, evaluator)
  (tmp_path / 'toy' / 'val' / 'v4_c.npy').unlink()
  skipping = dataclasses.replace(evaluator, missing='skip')
  with pytest.raises(StoreError, match='no features of any of the 2 videos'):
    run(tmp_path, skipping)


def test_wrong_files_are_told_of_before_training(tmp_path):
  annotations = long_videos(tmp_path, train=4, val=2)
  np.save(tmp_path / 'toy' / 'val' / 'v5_c.npy', np.zeros((50, 3)))
  with pytest.raises(StoreError, match=r'v5_c\.npy: 3 features, the videos be'):
    run(tmp_path, localization(annotations))


def test_settings_that_do_not_fit(toy):
  root, annotations = toy
  with pytest.raises(ValueError, match=r'detector\.num_classes=3: expected 2'):
    run(
      root,
      localization(annotations, detector=TemporalDetector(3, Pyramid((5, 5)))),
    )
  with pytest.raises(ValueError, match=r'expected detector\.num_classes=1'):
    localization(annotations, external='scores.json')
  with pytest.raises(ValueError, match=r'training\.length=60: expected a mult'):
    localization(annotations, training=HeadTraining(length=60))
  with pytest.raises(ValueError, match=r'timing\.resize=32 where videos are'):
    localization(annotations, timing=Timing(resize=32))
  with pytest.raises(ValueError, match=r'training\.batch=8 is larger than the'):
    run(root, localization(annotations))


def test_class_scores_must_cover_the_videos(toy):
  root, annotations = toy
  path = root / 'scores.json'
  path.write_text(json.dumps({'v4': [0.5, 0.5], 'v5': [1.0]}))
  evaluator = localization(
    annotations,
    external=str(path),
    detector=TemporalDetector(1, Pyramid((5, 5))),
  )
  with pytest.raises(StoreError, match="2 class scores of 'v5', found 1"):
    run(root, evaluator)


@pytest.mark.slow
def test_class_scores_name_stretched_videos(tmp_path):
  annotations = long_videos(tmp_path)
  database = json.loads((tmp_path / 'toy.json').read_text())['database']
  scores = {}
  for video, entry in database.items():
    labels = [CLASSES.index(a['label']) for a in entry['annotations']]
    scores[video] = (np.bincount(labels, minlength=2) / len(labels)).tolist()
  (tmp_path / 'scores.json').write_text(json.dumps(scores))
  base = localization(annotations)
  pyramid = dataclasses.replace(base.detector.pyramid, windows=(5, -1))
  evaluator = dataclasses.replace(
    base,
    detector=base.detector.clone(num_classes=1, pyramid=pyramid),
    decoding=Decoding(per_class=False, vote_threshold=0.9, sigma=0.75),
    timing=Timing(clip_length=0.0, stride=1.0, resize=64),
    external=str(tmp_path / 'scores.json'),
    duplicates='drop',
    cut=True,
    select='best',
  )
  numbers = run(tmp_path, evaluator).scalars
  name = 'toy_actionformer22ep_external'
  assert numbers[f'{name}_best_map'] >= numbers[f'{name}_last_map'] > 0.3
