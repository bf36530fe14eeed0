import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vfm_jax.models.encoders import VideoViT
from vfm_jax.objectives.base import Checks, Embeds, Objective
from vfm_jax.objectives.classify import Classify

K = 3


@pytest.fixture(scope='module')
def objective():
  encoder = VideoViT(
    width=16,
    depth=1,
    heads=2,
    patch=8,
    frames=2,
    image_size=16,
    pooling='mean',
    norm='pooled',
    num_classes=K,
    init_scheme='finetune',
    head_scale=1.0,
  )
  return Classify(encoder, 'action')


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(0)
  return {
    'video': rng.integers(0, 256, (4, 2, 16, 16, 3), np.uint8),
    'labels': {'action': np.array([0, 2, 1, 2], np.int32)},
    'row': np.arange(4, dtype=np.int32),
  }


def loss(objective, params, batch, *, train, seed=0):
  fn = functools.partial(objective.loss, train=train)
  return jax.device_get(jax.jit(fn)(params, {}, batch, jax.random.key(seed)))


@pytest.fixture(scope='module')
def params(objective, batch):
  return jax.jit(objective.init)(jax.random.key(1), batch)[0]


def test_it_satisfies_the_protocols(objective):
  for protocol in (Objective, Embeds, Checks):
    assert isinstance(objective, protocol)


def test_evaluation_is_plain_cross_entropy_of_the_encoder(
  objective, params, batch
):
  out = loss(objective, params, batch, train=False)

  @jax.jit
  def forward(params):
    video = objective._video(batch)
    logits = objective.encoder.apply({'params': params['encoder']}, video)
    return (
      logits,
      objective.logits(params, batch),
      objective.embed(params, batch),
    )

  logits, same, features = jax.device_get(forward(params))
  np.testing.assert_allclose(same, logits, atol=1e-6)
  y = batch['labels']['action']
  expected = optax.softmax_cross_entropy_with_integer_labels(logits, y)
  np.testing.assert_allclose(out.sums[0], expected.sum(), rtol=1e-6)
  assert out.counts[0] == 4
  top1 = np.mean(np.argmax(logits, 1) == y)
  assert out.metrics['top1'] == pytest.approx(top1)
  head = params['encoder']['head']
  again = features @ head['kernel'] + head['bias']
  np.testing.assert_allclose(again, logits, atol=1e-6)


def test_training_mixes_videos_as_it_mixes_labels(objective, params, batch):
  share = 0.3

  def mix(rng, size):
    del rng
    return jnp.full(size, share), jnp.float32(share)

  whole = dataclasses.replace(objective, mix=mix)
  out = loss(whole, params, batch, train=True)
  assert 'top1' not in out.metrics
  video = batch['video'] / np.float32(255)
  mixed = share * video + (1 - share) * video[[2, 3, 0, 1]]
  logits = jax.jit(objective.logits)(params, {**batch, 'video': mixed})
  soft = 0.9 * np.eye(K)[batch['labels']['action']] + 0.1 / K
  target = share * soft + (1 - share) * soft[[2, 3, 0, 1]]
  expected = optax.softmax_cross_entropy(logits, target).sum()
  np.testing.assert_allclose(out.sums[0], expected, rtol=1e-5)


def test_the_whole_batch_shares_a_draw_and_microbatches_repeat_it(
  objective, params, batch
):

  def mix(rng, size):
    share = jax.random.uniform(rng)
    return jnp.full(size, share), share

  objective = dataclasses.replace(objective, mix=mix)
  whole = loss(objective, params, batch, train=True)
  half = [jax.tree.map(lambda x, k=k: x[k::2], batch) for k in range(2)]
  fn = jax.jit(functools.partial(objective.loss, train=True))
  parts = [fn(params, {}, h, jax.random.key(0)) for h in half]
  np.testing.assert_allclose(whole.sums, sum(p.sums for p in parts), rtol=1e-5)


def test_dropout_is_of_the_features_and_off_in_evaluation(
  objective, params, batch
):
  plain = dataclasses.replace(objective, mix=None)
  dropped = dataclasses.replace(plain, head_drop=0.5)

  def sums(o, train):
    return loss(o, params, batch, train=train).sums[0]

  assert sums(plain, True) != sums(dropped, True)
  assert sums(plain, False) == sums(dropped, False)


def test_labels_out_of_range_are_refused(objective, batch):
  objective.check(batch)
  for wrong in (3, -1):
    labels = {'action': np.array([0, wrong])}
    with pytest.raises(ValueError, match=rf'\[0, 3\), found {wrong}'):
      objective.check({**batch, 'labels': labels})
  with pytest.raises(ValueError, match=r"no label 'action'.*\['scene'\]"):
    objective.check({**batch, 'labels': {'scene': np.zeros(4, int)}})


def test_settings_without_a_meaning_are_refused(objective):
  with pytest.raises(ValueError, match='num_classes'):
    Classify(VideoViT(), 'action')
  with pytest.raises(ValueError, match=r'objective.smoothing.*found 1'):
    dataclasses.replace(objective, smoothing=1.0)
