"""Check latent prediction: what sees what, who learns, and the loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.models.encoders import VideoViT
from vfm_jax.models.vjepa import LatentPredictor
from vfm_jax.objectives import base
from vfm_jax.objectives.latent import LatentPrediction, average
from vfm_jax.ops.blocks import MultiBlock, Split

ENCODER = dict(
  width=16,
  depth=2,
  heads=2,
  patch=8,
  frames=4,
  image_size=32,
  positions='sincos_3d',
  qkv_bias='full',
  init_scheme='normal',
)
MASKS = (
  MultiBlock(num_blocks=2, context=0.3, targets=0.4),
  MultiBlock(num_blocks=1, spatial_scale=(0.5, 0.5), context=0.25),
)
KEYS = jax.random.split(jax.random.key(1), 3)


def objective(**kwargs):
  return LatentPrediction(
    encoder=VideoViT(**ENCODER),
    predictor=LatentPredictor(width=12, depth=1, heads=2),
    **{'masks': MASKS, **kwargs},
  )


def batch_of(size=3):
  rng = np.random.default_rng(0)
  video = rng.integers(0, 256, (size, 4, 32, 32, 3), np.uint8)
  return {'video': video, 'row': np.arange(size, dtype=np.int32)}


BATCH = batch_of()


@pytest.fixture(scope='module')
def state():
  """Parameters, and a copy that differs from the encoder."""
  params, extra = jax.jit(objective().init)(jax.random.key(0), BATCH)
  noise = lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape)  # noqa: E731
  return params, jax.tree.map(noise, extra)


@functools.cache
def compiled():
  return jax.jit(objective().forward)


def test_what_is_hidden_reaches_the_targets_alone(state):
  obj = objective()
  video = obj.video_of(BATCH)
  made = compiled()(*state, video, KEYS)
  hidden = [np.ones((3, 32), bool) for _ in made.splits]
  for mask, split in zip(hidden, made.splits, strict=True):
    np.put_along_axis(mask, np.asarray(split.visible_idx), False, axis=1)
  # Change a token that neither mask of an example shows.
  token = np.argmax(hidden[0] & hidden[1], axis=1)
  t, h, w = np.unravel_index(token, (2, 4, 4))
  other = np.array(video)
  for i in range(3):
    rows, columns = (slice(8 * x[i], 8 * x[i] + 8) for x in (h, w))
    other[i, 2 * t[i] : 2 * t[i] + 2, rows, columns] += 1.0
  changed = compiled()(*state, jnp.asarray(other), KEYS)
  for name in ('encoded', 'preds'):
    jax.tree.map(
      np.testing.assert_array_equal, getattr(made, name), getattr(changed, name)
    )
  assert np.abs(changed.targets - made.targets).max() > 1e-3


def test_the_copy_gets_no_gradient_and_follows(state):
  obj, (params, extra) = objective(momentum=0.75, masks=MASKS[:1]), state

  def loss(params, extra):
    out = obj.loss(params, extra, BATCH, jax.random.key(2), train=True)
    return (out.sums / out.counts)[0], out

  compute = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
  (grads, none), out = compute(params, extra)
  assert all(np.any(g) for g in jax.tree.leaves(grads['encoder']['norm']))
  assert np.any(grads['predictor']['mask_tokens'])
  assert not any(np.any(g) for g in jax.tree.leaves(none))
  assert out.counts.tolist() == [3.0]
  assert float(out.sums[0] / 3) == pytest.approx(
    float(out.metrics['latent_error']), rel=1e-6
  )
  new = obj.after_update(extra, params, jnp.array(0), {})
  want = jax.tree.map(
    lambda t, s: 0.75 * t + 0.25 * s, extra['target'], params['encoder']
  )
  jax.tree.map(np.testing.assert_array_equal, new['target'], want)
  still = average(extra['target'], params['encoder'], 1.0)
  jax.tree.map(np.testing.assert_array_equal, still, extra['target'])
  halves = objective(momentum=lambda step: 0.5 * step)
  moved = halves.after_update(extra, params, jnp.array(1), {})['target']
  np.testing.assert_allclose(
    moved['norm']['scale'],
    (extra['target']['norm']['scale'] + params['encoder']['norm']['scale']) / 2,
    rtol=1e-6,
  )


@pytest.mark.slow
def test_loss_of_a_batch_is_the_mean_of_its_parts(state):
  """As gradient accumulation needs it: examples keep their masks."""
  obj = objective()
  loss = jax.jit(functools.partial(obj.loss, train=False))
  whole = loss(*state, BATCH, jax.random.key(2))
  ones = [
    loss(*state, {k: x[i : i + 1] for k, x in BATCH.items()}, jax.random.key(2))
    for i in range(3)
  ]
  assert float(whole.sums[0]) == pytest.approx(
    sum(float(o.sums[0]) for o in ones), rel=1e-5
  )


def test_error_of_tokens():
  obj, split = objective(), Split(jnp.zeros((1, 1), int), jnp.array([[2, 0]]))
  targets = jax.random.normal(jax.random.key(0), (1, 4, 6))
  exact = targets[:, [2, 0]]
  assert not np.any(obj.error(exact, targets, split))
  np.testing.assert_allclose(obj.error(exact + 2, targets, split), 2, rtol=1e-6)
  squared = dataclasses.replace(obj, exponent=2.0)
  np.testing.assert_allclose(
    squared.error(exact + 2, targets, split), 2, rtol=1e-6
  )


def test_targets_do_not_feel_scale_and_shift_of_tokens(state):
  """With one scale and one shift for all features, as LayerNorm has it."""
  obj, extra = objective(), state[1]
  norm = extra['target']['norm']
  plain = {'scale': jnp.ones(16), 'bias': jnp.zeros(16)}
  other = {'scale': jnp.full(16, 3.0), 'bias': jnp.full(16, -2.0)}
  assert norm['scale'].shape == (16,)
  fn = jax.jit(obj.targets)
  a, b = (
    fn({'target': {**extra['target'], 'norm': x}}, obj.video_of(BATCH))
    for x in (plain, other)
  )
  np.testing.assert_allclose(a, b, atol=1e-4)
  np.testing.assert_allclose(a.mean(-1), 0, atol=1e-5)


def test_hinge_counts_where_it_is_asked_for(state):
  made = compiled()(*state, objective().video_of(BATCH), KEYS)
  plain, hinged = (objective(hinge=w).score(made, {}) for w in (0.0, 2.0))
  extra = 3 * 2.0 * float(plain.metrics['latent_hinge'])
  assert extra > 0
  assert float(hinged.sums[0]) == pytest.approx(
    float(plain.sums[0]) + extra, rel=1e-5
  )


def test_evaluations_use_the_copy_unless_told(state):
  params, extra = state
  obj = objective()
  assert isinstance(obj, base.Averages)
  assert isinstance(obj, base.Embeds)
  assert isinstance(obj, base.EmbedsTokens)
  assert obj.evaluated(params, extra)['encoder'] is extra['target']
  student = objective(evaluate='student')
  assert student.evaluated(params, extra)['encoder'] is params['encoder']
  tokens = jax.jit(obj.tokens)(params, BATCH)
  assert tokens.shape == (3, 32, 16)
  again = obj.restart(extra, params)['target']
  jax.tree.map(np.testing.assert_array_equal, again, params['encoder'])


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (dict(masks=()), 'at least one of `objective.masks`'),
    (dict(masks=MASKS * 2), r'4 masks need.*found 2; or set `objective.mask_t'),
    (dict(momentum=1.5), r'`objective.momentum` from 0 to 1.*found 1.5'),
    (
      dict(encoder=VideoViT(pooling='mean', norm='pooled')),
      "found 'mean' and 'pooled'",
    ),
  ],
)
def test_settings_that_make_no_sense(fields, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(objective(), **fields)
