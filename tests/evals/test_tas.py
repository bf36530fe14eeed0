"""Train the segmentation head on long videos with known segments."""

import json
import pathlib

import numpy as np
import pytest

from vfm_jax import config
from vfm_jax.evals import tas_data, tas_train
from vfm_jax.evals.stored import StoredSet
from vfm_jax.evals.tas import Segmentation
from vfm_jax.evals.tas_plots import strips
from vfm_jax.models.temporal_segmentation import Segmenter

CLASSES = ('rest', 'pour', 'stir', 'cut')


@pytest.fixture(scope='module')
def films(tmp_path_factory):
  """Write 9 videos of about 400 frames in the official layouts."""
  root = tmp_path_factory.mktemp('films')
  rng = np.random.default_rng(0)
  means = rng.normal(size=(len(CLASSES), 6))
  features = root / 'store/films/train'
  labels = root / 'labels'
  for folder in (features, labels / 'groundTruth', labels / 'splits'):
    folder.mkdir(parents=True)
  mapping = ''.join(f'{i} {c}\n' for i, c in enumerate(CLASSES))
  (labels / 'mapping.txt').write_text(mapping)
  for v in range(9):
    order = rng.permutation(len(CLASSES)).tolist() * 2
    y = np.repeat(order, rng.integers(48, 56, len(order)))
    names = [CLASSES[c] for c in y]
    (labels / f'groundTruth/v{v}.txt').write_text('\n'.join(names) + '\n')
    # A clip every other frame, too noisy to tell a class by itself.
    clips = means[y[::2]]
    clips = clips + 0.8 * rng.normal(size=clips.shape)
    np.save(features / f'v{v}_c.npy', clips.astype(np.float32))
  split = [''.join(f'v{v}.txt\n' for v in vs) for vs in (range(6), (6, 7, 8))]
  for part, text in zip(('train', 'test'), split, strict=True):
    (labels / f'splits/{part}.split1.bundle').write_text(text)
  return root


def evaluator(films, **kwargs):
  head = dict(width=16, depth=3, decoders=1, dropout=0.0, channel_dropout=0.0)
  fields = dict(
    annotations=str(films / 'labels'),
    head=Segmenter(num_classes=len(CLASSES), **head),
    training=tas_train.Training(lr=5e-3, epochs=25),
    sampling=None,
    sample_rate=2,
    metrics='exact',
  )
  return Segmentation(**{**fields, **kwargs})


def data(films):
  return StoredSet(str(films / 'store'), 'films')


def test_finds_known_segments(films):
  out = evaluator(films).run_stored(data(films), seed=0)
  scores = out.scalars
  assert scores['films_asformer25ep_f1_50'] >= 0.95
  assert scores['films_asformer25ep_edit'] >= 0.9
  assert scores['films_asformer25ep_accuracy'] >= 0.9
  assert {m.task for m in out.metrics} == {'tas'}
  assert [t.name for t in out.timelines] == ['v6', 'v7', 'v8']
  assert out.timelines[0].truth[0].start == 0
  assert out.pictures['films'].startswith(b'\x89PNG')
  (confusion,) = out.confusions
  assert tuple(confusion.classes) == CLASSES


@pytest.mark.slow
@pytest.mark.parametrize('attend', ['sliding', 'full'])
def test_finds_known_segments_as_released(films, attend):
  head = Segmenter(
    num_classes=len(CLASSES),
    width=32,
    depth=4,
    window='block',
    attend=attend,
  )
  out = evaluator(
    films,
    head=head,
    training=tas_train.Training(lr=2e-3, epochs=60),
    metrics='released',
  ).run_stored(data(films), seed=0)
  assert out.scalars['films_asformer60ep_released_f1_50'] >= 0.95


def test_a_missing_feature_file_is_named(films, tmp_path):
  empty = tmp_path / 'films/train'
  empty.mkdir(parents=True)
  with pytest.raises(ValueError, match=r'v0_c\.npy'):
    evaluator(films).run_stored(StoredSet(str(tmp_path), 'films'), seed=0)


def test_errors_of_settings(films):
  wrong = evaluator(films, head=Segmenter(num_classes=7))
  with pytest.raises(ValueError, match=r'num_classes=7: expected 4'):
    wrong.run_stored(data(films), seed=0)
  with pytest.raises(ValueError, match='at least one of splits'):
    evaluator(films, splits=())
  with pytest.raises(ValueError, match=r'training\.epochs'):
    tas_train.Training(epochs=0)
  video = tas_data.LabelledVideo(
    'v', np.zeros((2, 1), np.float32), np.array([0, 4]), np.array([0, 4])
  )
  with pytest.raises(ValueError, match=r'num_classes=4 must be above'):
    tas_train.Training().fit(Segmenter(num_classes=4), [video], seed=0)
  with pytest.raises(ValueError, match='at least one video to draw'):
    strips([], CLASSES, 1.0)


def test_padding_has_few_lengths():
  lengths = {
    tas_train.padded(np.zeros((n, 1)), np.zeros(n, int))[0].shape[1]
    for n in range(1, 5000)
  }
  assert len(lengths) < 40
  x, y, valid = tas_train.padded(np.ones((5777, 2)), np.ones(5777, int))
  assert x.shape == (1, 6144, 2)
  assert valid.sum() == y.sum() == 5777


def test_the_rate_falls_where_the_loss_stalls():
  plateau = tas_train.Plateau(1.0, patience=1)
  losses = [3.0, 2.0, 2.0, 2.0, 1.0, 0.99999, 1.0, 1.0]
  rates = [plateau.update(x) for x in losses]
  assert rates == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize(
  ('variant', 'classes', 'splits'),
  [('50salads', 19, 5), ('gtea', 11, 4), ('breakfast', 48, 4)],
)
def test_recipe(variant, classes, splits):
  path = pathlib.Path(__file__).parents[2] / 'configs/tas.py'
  built = config.build(config.load(f'{path}:{variant}'))
  (evaluator,) = built.evaluators.values()
  assert evaluator.head.num_classes == classes
  assert len(evaluator.splits) == splits
  columns = [
    m.benchmark
    for m in evaluator._metrics(built.dataset, [dict.fromkeys(KEYS, 50.0)])
  ]
  assert [c for c in columns if c] == [
    f'{built.dataset} {m}' for m in ('accuracy', 'edit', 'mF1')
  ]


KEYS = ('accuracy', 'edit', 'f1_10', 'f1_25', 'f1_50')


# The evaluator runs on a store above; the recipe only sets its fields.
@pytest.mark.slow
def test_recipe_runs_on_a_store(films, tmp_path):
  path = pathlib.Path(__file__).parents[2] / 'configs/tas.py'
  c = config.load(f'{path}:gtea')
  c.root, c.dataset = str(films / 'store'), 'films'
  c.evaluators.tas.update(
    annotations=str(films / 'labels'), splits=(1,), sampling=None
  )
  c.evaluators.tas.training.epochs = 1
  c.evaluators.tas.head.update(
    num_classes=len(CLASSES), width=8, depth=1, decoders=0
  )
  config.build(c).run(str(tmp_path))
  (path,) = (tmp_path / 'results').glob('*.json')
  names = {m['name'] for m in json.loads(path.read_text())['metrics']}
  assert 'films_asformer1ep_released_f1_50' in names
  assert list((tmp_path / 'results').glob('*.png'))
