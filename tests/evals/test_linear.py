"""Check the linear probe: schedule, batches, clips, and its errors."""

import time

import jax
import numpy as np
import pytest

from vfm_jax.evals.base import Features
from vfm_jax.evals.linear import Linear, LinearProbe, init_linear, predict


def blobs(n=60, d=6, classes=3, seed=0):
  rng = np.random.default_rng(seed)
  centres = 3 * np.random.default_rng(7).normal(size=(classes, d))
  y = np.arange(n) % classes
  return Features.of_videos(centres[y] + rng.normal(size=(n, d)), y)


def test_schedule():
  probe = LinearProbe(lr=0.5, batch=10, epochs=8, warmup_epochs=3)
  lrs = probe.learning_rates(25)  # 2 steps an epoch: the last 5 are dropped
  assert len(lrs) == 16
  assert lrs.dtype == np.float64
  assert lrs[0] == 0.5 / 6
  assert lrs[5] == lrs[6] == 0.5
  assert 0 < lrs[-1] < 0.02
  no_warmup = LinearProbe(lr=0.5, batch=10, epochs=8, warmup_epochs=0)
  assert no_warmup.learning_rates(25)[0] == 0.5
  floor = LinearProbe(
    lr=0.5, batch=10, epochs=8, warmup_epochs=0, min_lr=0.1
  ).learning_rates(25)
  assert 0.1 < floor[-1] < 0.12


def test_batches_are_full_permutations_without_the_rest():
  probe = LinearProbe(batch=8, epochs=12, warmup_epochs=1)
  rows = probe.batch_rows(blobs(20), seed=3)
  assert rows.shape == (24, 8)
  for epoch in rows.reshape(12, 16):
    assert len(set(epoch)) == 16
  assert set(rows.ravel()) == set(range(20))
  np.testing.assert_array_equal(rows, probe.batch_rows(blobs(20), seed=3))
  assert (rows != probe.batch_rows(blobs(20), seed=4)).any()


def test_a_video_gives_one_random_clip_an_access():
  clips = [np.zeros((m, 2)) for m in (1, 3, 2)]
  train = Features.of_clips(clips, [0, 1, 0])
  probe = LinearProbe(batch=3, epochs=40, warmup_epochs=1)
  rows = probe.batch_rows(train, seed=0)
  for step in rows:
    assert sorted(train.video[step]) == [0, 1, 2]
  assert set(rows.ravel()) == set(range(6))


def test_initial_weights_are_uniform_within_the_inverse_root_of_the_width():
  kernel, bias = init_linear(jax.random.key(0), 400, 50)
  for x in (kernel, bias):
    assert np.abs(x).max() <= 0.05
    assert np.abs(x).max() > 0.045
  np.testing.assert_allclose(np.std(kernel), 0.05 / 3**0.5, rtol=0.02)


def test_learns_separable_classes_and_repeats_itself():
  probe = LinearProbe(lr=0.02, batch=20, epochs=30, warmup_epochs=3)
  a = probe.run(blobs(), blobs(seed=1), 3, seed=5)
  assert a.top1 > 0.95
  assert a.losses[-1] < 0.3 * a.losses[0]
  assert a.scores.shape == (60, 3)
  b = probe.run(blobs(), blobs(seed=1), 3, seed=5)
  np.testing.assert_array_equal(a.scores, b.scores)


def test_steps_equal_adam_by_hand():
  train = blobs(8)
  probe = LinearProbe(lr=0.1, batch=8, epochs=3, warmup_epochs=1)
  start = init_linear(jax.random.key(1), 6, 3)
  got = probe.run(train, train, 3, params=start)
  w, b = np.asarray(start.kernel, float), np.asarray(start.bias, float)
  state = [[np.zeros_like(p), np.zeros_like(p)] for p in (w, b)]
  rows = probe.batch_rows(train, 0)
  for t, (index, lr) in enumerate(zip(rows, got.lrs, strict=True), 1):
    logits = train.x[index] @ w + b
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    error = (p - np.eye(3)[train.y[index]]) / len(index)
    new = []
    for value, grad, s in zip(
      (w, b), (train.x[index].T @ error, error.sum(0)), state, strict=True
    ):
      s[0] = 0.9 * s[0] + 0.1 * grad
      s[1] = 0.999 * s[1] + 0.001 * grad**2
      root = np.sqrt(s[1] / (1 - 0.999**t)) + 1e-8
      new.append(value - lr * s[0] / (1 - 0.9**t) / root)
    w, b = new
  np.testing.assert_allclose(got.params.kernel, w, atol=1e-4)
  np.testing.assert_allclose(got.params.bias, b, atol=1e-4)


def test_clips_average_probabilities_not_logits():
  params = Linear(np.eye(2, dtype=np.float32), np.zeros(2, np.float32))
  # Logits average to class 0 (10 against 7.5); probabilities to class 1.
  clips = [np.array([[20.0, 0.0], [0.0, 5.0], [0.0, 5.0]])]
  scores = predict(params, Features.of_clips(clips, [1]))
  assert clips[0].mean(0).argmax() == 0
  assert scores.argmax() == 1
  np.testing.assert_allclose(scores.sum(), 1, rtol=1e-6)


def test_batch_larger_than_the_set():
  with pytest.raises(ValueError, match=r'linear.batch=1024 .* 60 training'):
    LinearProbe().run(blobs(), blobs(), 3)
  probe = LinearProbe(fit_batch=True, epochs=4, warmup_epochs=1)
  result = probe.run(blobs(), blobs(), 3)
  assert result.losses.shape == (4,)


def test_errors():
  with pytest.raises(ValueError, match='warmup_epochs'):
    LinearProbe(epochs=10)
  with pytest.raises(ValueError, match=r'linear\.batch'):
    LinearProbe(batch=0)
  with pytest.raises(ValueError, match=r'labels must lie in \[0, 2\)'):
    LinearProbe(batch=8).run(blobs(), blobs(), 2)


def test_default_epochs_take_about_a_second():
  train = blobs(64, d=32)
  probe = LinearProbe(batch=16)
  probe.run(train, train, 3)
  begin = time.perf_counter()
  probe.run(train, train, 3)
  assert time.perf_counter() - begin < 5
