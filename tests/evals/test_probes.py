"""Check the probes as the loop runs them."""

import dataclasses
import functools
import pickle

import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.data import clips
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.data.synthetic import MovingShapes
from vfm_jax.evals.base import Evaluator
from vfm_jax.evals.embed import Embedded
from vfm_jax.evals.knn import KNN
from vfm_jax.evals.linear import LinearProbe
from vfm_jax.evals.probes import Probes, pixel_features


def identity(frames, rng):
  del rng
  return frames


@dataclasses.dataclass(frozen=True)
class Oracle:
  """Embed the label that it is told, or noise."""

  label: str

  def embed(self, params, batch):
    y = batch['labels'][self.label]
    return params['on'] * jnp.eye(8)[y] + 1e-3


def data(count, seed=0):
  return Pipeline(
    source=MovingShapes(
      count=count, frames=4, size=16, directions=4, seed=seed
    ),
    clip=functools.partial(clips.uniform, frames=4),
    transform=identity,
  )


def probes(**kwargs):
  fields = dict(
    train=data(32),
    val=data(16, seed=1),
    labels=('shape', 'direction'),
    knn=KNN(k=3),
    linear=LinearProbe(lr=0.1, fit_batch=True, epochs=40, warmup_epochs=1),
    batch_size=8,
  )
  return Probes(**{**fields, **kwargs})


def test_scores_what_the_embedding_knows():
  p = probes()
  assert isinstance(p, Evaluator)
  got = p.run(Oracle('shape'), {'on': 1.0}, seed=0)
  assert set(got) == {
    'shape_knn3_top1',
    'shape_linear40ep_top1',
    'direction_knn3_top1',
    'direction_linear40ep_top1',
  }
  assert got['shape_knn3_top1'] == got['shape_linear40ep_top1'] == 1.0
  assert got['direction_linear40ep_top1'] < 0.8
  again = p.run(Oracle('shape'), {'on': 1.0}, seed=0)
  assert got == again
  assert all(type(v) is float for v in got.values())


def test_cache_decodes_once_and_stays_out_of_pickles(monkeypatch):
  calls = []
  plain = Pipeline.eval_batches

  def counted(self, *args, **kwargs):
    calls.append(1)
    return plain(self, *args, **kwargs)

  monkeypatch.setattr(Pipeline, 'eval_batches', counted)
  for cache, want in ((True, 2), (False, 4)):
    calls.clear()
    p = probes(cache=cache, linear=None)
    p.run(Oracle('shape'), {'on': 1.0}, seed=0)
    p.run(Oracle('shape'), {'on': 1.0}, seed=0)
    assert len(calls) == want
  p = probes()
  size = len(pickle.dumps(p))
  p.run(Oracle('shape'), {'on': 1.0}, seed=0)
  assert len(pickle.dumps(p)) == size
  assert pickle.loads(pickle.dumps(p)).labels == p.labels


def test_pixels_are_a_baseline_of_their_own():
  got = probes(pixels=4, linear=None, labels=('shape',)).run(
    Oracle('shape'), {'on': 1.0}, seed=0
  )
  assert set(got) == {'shape_knn3_top1', 'shape_pixels4_knn3_top1'}
  assert got['shape_pixels4_knn3_top1'] < 1
  features = pixel_features(data(10).eval_batches(4), 4)
  assert isinstance(features, Embedded)
  assert features.x.shape == (10, 4 * 4 * 4 * 3)
  assert 0 <= features.x.min() < features.x.max() <= 1
  batch = next(iter(data(4).eval_batches(4)))
  pooled = batch['video'].reshape(4, 4, 4, 4, 4, 4, 3).mean((3, 5)) / 255
  np.testing.assert_allclose(
    features.x[:4].mean(1), pooled.reshape(4, -1).mean(1), atol=0.02
  )


def test_errors_come_before_training_where_they_can():
  with pytest.raises(ValueError, match=r'probes.knn.k=200 .* 32'):
    probes(knn=KNN())
  with pytest.raises(ValueError, match=r'linear.batch=1024'):
    probes(linear=LinearProbe())
  with pytest.raises(ValueError, match='at least one label'):
    probes(labels=())
  with pytest.raises(ValueError, match='one of knn and linear'):
    probes(knn=None, linear=None)
  with pytest.raises(ValueError, match=r"no label 'scene'.*direction"):
    probes(labels=('scene',)).run(Oracle('shape'), {'on': 1.0}, seed=0)
  with pytest.raises(TypeError, match='no embed'):
    probes().run(object(), {}, seed=0)
