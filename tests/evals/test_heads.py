"""Check heads on frozen features: the linear and the attentive probe."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax import config, optim, sharding
from vfm_jax.data import augment, clips
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.data.synthetic import MovingShapes
from vfm_jax.evals import heads
from vfm_jax.evals.attentive import AttentiveProbe
from vfm_jax.evals.base import Evaluator
from vfm_jax.evals.heads import Training
from vfm_jax.evals.online import LinearHead, OnlineLinearProbe
from vfm_jax.evals.outcome import Detailed
from vfm_jax.models.attentive import AttentivePooler


@dataclasses.dataclass(frozen=True)
class Oracle:
  """Tell the shape in one token of four; the others are noise."""

  def tokens(self, params, batch):
    y = batch['labels']['shape']
    keys = jax.vmap(jax.random.key)(batch['index'])
    noise = jax.vmap(lambda k: 0.3 * jax.random.normal(k, (4, 8)))(keys)
    told = jnp.eye(8)[y] * params['on'] + jnp.eye(8)[7]
    return noise.at[:, 2].set(3 * told)

  def embed(self, params, batch):
    return self.tokens(params, batch)[:, 2]


ON = {'on': 1.0}


def data(count, seed=0, clip=clips.uniform, crop=augment.identity, **kwargs):
  return Pipeline(
    source=MovingShapes(count=count, frames=4, size=16, seed=seed),
    clip=functools.partial(clip, frames=4),
    transform=crop,
    **kwargs,
  )


def training(**kwargs):
  fields = dict(lrs=(0.1,), epochs=6, batch=16, cache=True)
  return Training(**{**fields, **kwargs})


def linear(**kwargs):
  fields = dict(
    train=data(48),
    val=data(24, seed=1),
    labels=('shape',),
    training=training(method=optim.sgd, warmup_epochs=1),
    eval_batch=16,
  )
  return OnlineLinearProbe(**{**fields, **kwargs})


def attentive(**kwargs):
  fields = dict(
    pooler=AttentivePooler(heads=2, mlp_ratio=1.0),
    training=training(lrs=(0.03, 1e-6), wds=(1e-5, 0.1), epochs=40),
  )
  return AttentiveProbe(
    train=data(48),
    val=data(24, seed=1),
    labels=('shape',),
    eval_batch=16,
    **{**fields, **kwargs},
  )


def test_an_attentive_grid_learns_and_every_setting_is_reported():
  probe = attentive()
  assert isinstance(probe, Evaluator)
  assert isinstance(probe, Detailed)
  out = probe.evaluate(Oracle(), ON, seed=0)
  got = out.scalars
  name = 'shape_attentive40ep'
  assert list(got) == [
    f'{name}_best_of_4_top1',
    f'{name}_lr0.03_wd1e-05_top1',
    f'{name}_lr0.03_wd0.1_top1',
    f'{name}_lr1e-06_wd1e-05_top1',
    f'{name}_lr1e-06_wd0.1_top1',
  ]
  best, *grid = got.values()
  assert best == max(grid) > 0.95
  assert grid[2] < 0.6  # a rate too low to learn anything
  assert 'lr 0.03' in out.metrics[0].protocol
  assert 'best of 4' in out.metrics[0].protocol
  counts = np.array(out.confusions[0].counts)
  assert counts.shape == (4, 4)
  assert np.trace(counts) / counts.sum() == pytest.approx(best)


def train_grid(lrs, wds, **kwargs):
  found = heads.train_heads(
    Oracle(),
    ON,
    LinearHead,
    data(48),
    data(24, seed=1),
    ('shape',),
    training(lrs=lrs, wds=wds, epochs=2, clip_norm=0.5),
    reads='embed',
    eval_batch=16,
    seed=3,
    **kwargs,
  )
  return found['shape']


def test_a_setting_of_the_grid_learns_as_it_would_alone():
  grid = train_grid((0.1, 0.02), (0.0, 0.3))
  assert grid.losses.shape == (6, 4)
  alone = train_grid((0.02,), (0.3,))
  for a, b in (
    (grid.losses[:, 3], alone.losses[:, 0]),
    (grid.probabilities[3], alone.probabilities[0]),
    (grid.params['Dense_0']['kernel'][3], alone.params['Dense_0']['kernel'][0]),
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  assert len(set(grid.losses[-1].tolist())) == 4


@pytest.mark.slow
def test_a_mesh_changes_nothing():
  mesh = sharding.make_mesh(sharding.Mesh())
  one, many = (
    train_grid((0.1, 0.02), (0.0, 0.3), mesh=m) for m in (None, mesh)
  )
  np.testing.assert_allclose(many.losses, one.losses, rtol=1e-4)


def test_sgd_follows_its_definition():
  """Recompute in NumPy: momentum 0.9, warm-up from lr0 / W, a cosine."""
  t = training(method=optim.sgd, epochs=3, warmup_epochs=1, batch=48)
  rates = 0.1 * t.schedule(48)
  np.testing.assert_allclose(rates, [0.1, 0.1, 0.05])
  found = heads.train_heads(
    Oracle(), ON, LinearHead, data(48), data(24), ('shape',), t,
    reads='embed', eval_batch=48, seed=0,
  )['shape']  # fmt: skip
  batch = next(iter(data(48).eval_batches(48)))
  x = np.asarray(Oracle().embed(ON, batch), np.float64)
  y = batch['labels']['shape']
  key = jax.random.fold_in(jax.random.key(0), 0)
  p = LinearHead(4).init(key, x[:1].astype(np.float32))['params']['Dense_0']
  w, b = (np.asarray(p[k], np.float64) for k in ('kernel', 'bias'))
  v = [0.0, 0.0]
  for rate, want in zip(rates, found.losses[:, 0], strict=True):
    z = np.exp(x @ w + b)
    q = z / z.sum(1, keepdims=True)
    np.testing.assert_allclose(want, -np.log(q[range(48), y]).mean(), rtol=1e-5)
    g = (q - np.eye(4)[y]) / 48
    v = [0.9 * v[0] + x.T @ g, 0.9 * v[1] + g.sum(0)]
    w, b = w - rate * v[0], b - rate * v[1]
  got = found.params['Dense_0']
  np.testing.assert_allclose(got['kernel'][0], w, atol=1e-5)
  np.testing.assert_allclose(got['bias'][0], b, atol=1e-5)


def test_schedule_of_the_report():
  t = Training(lrs=(0.1,), epochs=150, warmup_epochs=10, batch=1024)
  rates = t.schedule(5000)  # 4 full batches a pass
  assert len(rates) == 150 * 4
  assert rates[0] == 1 / 40
  assert rates[40] == 1.0
  assert 0 < rates[-1] < 1e-4


def test_the_encoder_in_the_loop_sees_drawn_clips_and_views_are_averaged():
  crop = functools.partial(augment.random_resized_crop, size=16)
  views = functools.partial(augment.three_crops, size=16)
  four = functools.partial(clips.segment_test, clips=4)
  probe = linear(
    train=data(48, clip=clips.segment_train, crop=crop),
    val=data(6, seed=1, clip=four, crop=views, views=12),
    training=training(method=optim.lars, lrs=(5.0,), cache=False),
  )
  got = probe.run(Oracle(), ON, seed=0)
  assert list(got) == ['shape_online_linear6ep_12views_top1']
  assert got == probe.run(Oracle(), ON, seed=0)


def test_probabilities_of_views_are_averaged_not_logits():
  logits = np.log([[0.9, 0.1], [0.3, 0.7], [0.3, 0.7], [0.5, 0.5]])
  logits[0] *= 0.5  # sums of logits would say 0 for the first video
  logits[0] += 3
  p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  batch = dict(
    index=np.array([4, 4, 4, -1]),
    valid=np.array([True, True, True, False]),
    labels={'a': np.array([1, 1, 1, 0])},
  )
  out = heads._evaluate(
    lambda x: {'a': x[None]}, lambda item: p, [batch], ('a',)
  )
  probabilities, y = out['a']
  np.testing.assert_allclose(probabilities[0], p[:3].mean(0)[None], rtol=1e-6)
  np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-6)
  assert y.tolist() == [1]


def test_three_crops_of_a_square_coincide():
  frames = np.random.default_rng(0).integers(0, 256, (4, 20, 20, 3), np.uint8)
  crops = augment.three_crops(frames, np.random.default_rng(0), size=16)
  assert len(crops) == 3
  np.testing.assert_array_equal(crops[0], crops[1])
  np.testing.assert_array_equal(crops[0], crops[2])


def test_errors_say_what_to_change():
  with pytest.raises(ValueError, match=r'training.batch=99 is larger .* 48'):
    linear(training=training(batch=99))
  assert training(batch=99, fit_batch=True).batch_of(48) == 48
  with pytest.raises(ValueError, match=r'lrs and training.wds'):
    training(lrs=())
  with pytest.raises(ValueError, match='warmup_epochs < epochs'):
    training(warmup_epochs=6)
  with pytest.raises(ValueError, match='at least one label'):
    linear(labels=())
  with pytest.raises(ValueError, match=r"no label 'mood'.*direction"):
    linear(labels=('mood',)).run(Oracle(), ON, seed=0)
  with pytest.raises(TypeError, match='no tokens'):
    attentive().run(object(), ON, seed=0)
  with pytest.raises(TypeError, match='no embed'):
    linear().run(object(), ON, seed=0)
  diverging = linear(training=training(method=optim.sgd, lrs=(1e38,)))
  with pytest.raises(ValueError, match='diverged'):
    diverging.run(Oracle(), {'on': 1e30}, seed=0)


def test_recipes_can_hold_the_probes():
  probe = config.ref(
    AttentiveProbe,
    pooler=config.ref(AttentivePooler, heads=2),
    train=config.ref(Pipeline, source=config.ref(MovingShapes, count=512)),
    val=config.ref(Pipeline, source=config.ref(MovingShapes, count=8)),
    labels=('shape',),
  )
  built = config.build(probe)
  assert built.training.lrs == (1e-3,)
  assert built.training.method.keywords['b2'] == 0.999
