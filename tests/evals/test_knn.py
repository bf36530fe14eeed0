"""Check the kNN probe against its definition in NumPy."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend import core

from vfm_jax.evals import knn as knn_lib
from vfm_jax.evals.base import Features
from vfm_jax.evals.knn import KNN, loader_order

CLASSES = 5


def brute_force(knn, bank, labels, queries):
  def unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

  s = unit(queries.astype(float)) @ unit(bank.astype(float)).T
  scores = np.zeros((len(queries), CLASSES))
  for q, row in enumerate(s):
    for j in np.argsort(-row, kind='stable')[: knn.k]:
      scores[q, labels[j]] += np.exp(row[j] / knn.temperature)
  return scores


def draw(n, q=6, d=8, seed=0):
  rng = np.random.default_rng(seed)
  return (
    rng.normal(size=(n, d)).astype(np.float32),
    rng.integers(0, CLASSES, n).astype(np.int32),
    rng.normal(size=(q, d)).astype(np.float32),
  )


@given(
  seed=st.integers(0, 99),
  k=st.sampled_from([1, 7]),
  chunk=st.sampled_from([3, 64]),
)
@settings(max_examples=15, deadline=None)
def test_matches_the_definition_whatever_the_chunk(seed, k, chunk):
  bank, labels, queries = draw(20, seed=seed)
  knn = KNN(k=k, chunk=chunk)
  got = knn.scores(bank, labels, queries, CLASSES)
  assert got.dtype == np.float32
  want = brute_force(knn, bank, labels, queries)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-3)


def test_chunks_give_identical_answers_on_ties():
  bank, labels, queries = draw(10)
  bank = np.repeat(bank, 3, 0)  # every row has two equals of another class
  labels = np.tile(labels, 3)
  whole = KNN(k=4).scores(bank, labels, queries, CLASSES)
  for chunk in (1, 7):
    parts = KNN(k=4, chunk=chunk).scores(bank, labels, queries, CLASSES)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


@pytest.mark.parametrize('devices', [None, (2, 4)])
def test_ties_resolve_as_in_a_stable_sort_of_the_whole_bank(devices):
  # Signs over 16 features have unit vectors and products without rounding,
  # so that most similarities tie exactly. A class a row tells who voted.
  rng = np.random.default_rng(0)
  bank, queries = (rng.choice([-1.0, 1.0], (n, 16)) for n in (61, 5))
  knn = KNN(k=9, chunk=7, temperature=1.0)
  mesh = None if devices is None else jax.make_mesh(devices, ('x', 'y'))
  got = knn.scores(bank, np.arange(61), queries, 61, mesh=mesh)
  s = queries @ bank.T / 16
  want = np.zeros_like(got)
  nearest = np.argsort(-s, axis=1, kind='stable')[:, :9]
  np.put_along_axis(want, nearest, np.exp(np.sort(-s)[:, :9] * -1), 1)
  np.testing.assert_array_equal(got > 0, want > 0)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  assert len(np.unique(np.take_along_axis(s, nearest, 1))) < 9


def test_the_similarity_matrix_never_exists():
  spec = jax.ShapeDtypeStruct
  n, q, d, chunk, k = 4096, 512, 8, 256, 20
  jaxpr = jax.make_jaxpr(
    functools.partial(knn_lib._votes, k=k, chunk=chunk, num_classes=CLASSES)
  )(
    spec((n, d), np.float32),
    spec((n,), np.int32),
    spec((2, q // 2, d), np.float32),
    spec((), np.int32),
    spec((), np.float32),
  )
  largest = max(_sizes(jaxpr.jaxpr))
  assert largest == q // 2 * (chunk + k) < q * n / 10


def _sizes(jaxpr):
  for eqn in jaxpr.eqns:
    yield from (v.aval.size for v in eqn.outvars)
    for inner in core.jaxprs_in_params(eqn.params):
      yield from _sizes(inner)


def test_one_neighbour_is_the_nearest_by_cosine():
  bank, labels, queries = draw(30, q=12)
  got = KNN(k=1).scores(bank, labels, queries, CLASSES).argmax(1)
  cosine = queries @ (bank / np.linalg.norm(bank, axis=1, keepdims=True)).T
  np.testing.assert_array_equal(got, labels[cosine.argmax(1)])


def test_at_infinite_temperature_all_votes_weigh_the_same():
  bank, labels, queries = draw(30)
  scores = KNN(k=9, temperature=1e9).scores(bank, labels, queries, CLASSES)
  np.testing.assert_allclose(scores.sum(1), 9)
  np.testing.assert_allclose(scores, np.round(scores))


def test_scale_of_the_embeddings_changes_nothing():
  bank, labels, queries = draw(30)
  a = KNN(k=5).scores(bank, labels, queries, CLASSES)
  b = KNN(k=5).scores(512 * bank, labels, queries / 64, CLASSES)
  np.testing.assert_allclose(a, b, rtol=1e-5)


def test_zero_vectors_do_not_give_nan():
  bank, labels, queries = draw(30)
  assert np.isfinite(KNN(k=5).scores(0 * bank, labels, queries, CLASSES)).all()


def test_clip_scores_are_summed_which_is_not_averaging_embeddings():
  train = Features.of_videos(np.array([[1, 0], [0, 1], [1, 1]]), [0, 1, 2])
  clips = [np.array([[1.0, 0.0], [0.0, 0.9]])]
  knn = KNN(k=1)
  by_clip = knn.run(train, Features.of_clips(clips, [0]), 3)
  by_mean = knn.run(train, Features.of_videos([clips[0].mean(0)], [0]), 3)
  np.testing.assert_allclose(by_clip.scores, [[np.exp(10), np.exp(10), 0]])
  assert by_clip.predictions[0] == 0
  assert by_mean.predictions[0] == 2
  assert (by_clip.top1, by_mean.top1) == (1.0, 0.0)


def test_every_clip_of_a_training_video_is_in_the_bank():
  train = Features.of_clips([np.eye(2), np.array([[1.0, 1.0]])], [0, 1])
  val = Features.of_videos(np.array([[1.0, 0.0]]), [0])
  scores = KNN(k=3, temperature=1.0).run(train, val, 2).scores
  np.testing.assert_allclose(scores, [[np.e + 1, np.exp(0.5**0.5)]], rtol=1e-5)


def test_bank_batch_drops_what_the_official_loader_drops():
  bank, labels, queries = draw(10)
  train, val = (
    Features.of_videos(bank, labels),
    Features.of_videos(queries, [0] * 6),
  )
  items = KNN(k=2, bank_batch=4).bank_items(10, seed=12)
  np.testing.assert_array_equal(items, loader_order(10, 12)[:8])
  assert len(set(items)) == 8
  got = KNN(k=2, bank_batch=4).run(train, val, CLASSES, seed=12)
  want = KNN(k=2).run(train.take(items), val, CLASSES)
  np.testing.assert_array_equal(got.scores, want.scores)
  np.testing.assert_array_equal(KNN().bank_items(3, 0), [0, 1, 2])


def test_errors_say_what_to_change():
  bank, labels, queries = draw(10)
  with pytest.raises(ValueError, match=r'knn.k=11 .* bank of 10 rows'):
    KNN(k=11).scores(bank, labels, queries, CLASSES)
  with pytest.raises(ValueError, match=r'labels must lie in \[0, 2\)'):
    KNN(k=1).scores(bank, labels, queries, 2)
  with pytest.raises(ValueError, match='8 features'):
    KNN(k=1).scores(bank, labels, queries[:, :3], CLASSES)
  with pytest.raises(ValueError, match='drops all 10'):
    KNN(k=1, bank_batch=11).bank_items(10, 0)
  with pytest.raises(ValueError, match='temperature'):
    KNN(temperature=0.001)
  with pytest.raises(ValueError, match=r'knn\.k'):
    KNN(k=0)
