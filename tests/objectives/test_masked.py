from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.models.encoders import VideoViT
from vfm_jax.models.predictors import PixelDecoder
from vfm_jax.objectives import base
from vfm_jax.objectives.masked import Masked
from vfm_jax.ops import masking
from vfm_jax.ops.tokens import patchify

ENCODER = dict(width=16, depth=2, heads=2, patch=4, frames=4, image_size=16)
RNG = jax.random.key(7)


def objective(encoder=(), **kwargs):
  return Masked(
    encoder=VideoViT(**{**ENCODER, **dict(encoder)}),
    decoder=PixelDecoder(width=8, depth=1, heads=2),
    **{'mask': partial(masking.tube, ratio=0.75), **kwargs},
  )


def batch_of(size=4, frames=4, side=16):
  rng = np.random.default_rng(0)
  video = rng.integers(0, 256, (size, frames, side, side, 3), np.uint8)
  return {'video': video, 'row': np.arange(size, dtype=np.int32)}


BATCH = batch_of()


@pytest.fixture(scope='module')
def params():
  return jax.jit(objective().init)(jax.random.key(0), BATCH)[0]


def loss_of(obj, params, batch=BATCH, train=True):
  fn = jax.jit(partial(obj.loss, train=train))
  return fn(params, {}, batch, RNG)


@pytest.mark.parametrize(
  ('size', 'decoder', 'total', 'decoder_total'),
  [
    ('S', dict(width=192, heads=3), 24_029_376, 2_075_520),
    ('B', dict(), 94_210_944, 7_688_448),
    ('L', dict(width=512, heads=8, depth=12), 342_996_992, 38_611_456),
    ('H', dict(width=640, heads=8, depth=12), 692_487_296, 60_060_416),
    ('H', dict(width=512, heads=8), 645_659_392, 13_396_480),
    (
      'g',
      dict(width=512, heads=8, mlp_ratio=48 / 11),
      1_026_306_560,
      13_974_400,
    ),
  ],
)
def test_parameter_counts(size, decoder, total, decoder_total):
  # Scanned, they are quicker to trace.
  decode = PixelDecoder(**decoder, scan=True)
  obj = Masked(VideoViT(size=size, scan=True), decode)
  video = jax.ShapeDtypeStruct((1, 16, 224, 224, 3), jnp.uint8)
  params, _ = jax.eval_shape(obj.init, jax.random.key(0), {'video': video})
  count = lambda t: sum(x.size for x in jax.tree.leaves(t))  # noqa: E731
  assert count(params) == total
  ends = ('embed', 'mask_token')
  inner = {k: v for k, v in params['decoder'].items() if k not in ends}
  assert count(inner) == decoder_total


def test_satisfies_the_protocols():
  for protocol in (base.Objective, base.Embeds, base.Visualises):
    assert isinstance(objective(), protocol)


def test_target_is_normalised_by_token_and_channel(params):
  video = BATCH['video'] / np.float32(255)
  video[0] = 0.25
  keys = jax.random.split(RNG, 4)

  @jax.jit
  def reconstruct(params):
    return [
      objective(normalise_target=on).reconstruct(params, video, keys)
      for on in (True, False)
    ]

  out, raw = reconstruct(params)
  assert not np.any(out.target[0])
  pixels = np.asarray(out.target[1:]).reshape(3, -1, 32, 3)
  np.testing.assert_allclose(pixels.mean(2), 0, atol=1e-5)
  np.testing.assert_allclose(pixels.std(2, ddof=1), 1, atol=1e-4)
  cut = np.asarray(patchify(video, (2, 4, 4)))
  idx = np.asarray(raw.target_idx)[..., None]
  np.testing.assert_array_equal(raw.target, np.take_along_axis(cut, idx, 1))


def test_loss_is_the_mean_over_hidden_tokens(params):
  obj = objective()
  out = loss_of(obj, params)
  assert out.counts.tolist() == [4 * 24]
  keys = base.example_keys(RNG, BATCH)
  keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
  video = jnp.asarray(BATCH['video']) / 255
  parts = jax.jit(obj.reconstruct)(params, video, keys)
  want = np.square(parts.pred - parts.target).mean()
  np.testing.assert_allclose(out.sums / out.counts, want, rtol=1e-5)
  np.testing.assert_allclose(out.metrics['masked_mse'], want, rtol=1e-5)
  floats = loss_of(obj, params, {**BATCH, 'video': video})
  np.testing.assert_allclose(floats.sums, out.sums, rtol=1e-5)


@pytest.mark.slow
def test_microbatches_add_up(params):
  obj = objective(
    dict(drop_path=0.5), decoder_mask=partial(masking.running_cell, ratio=0.5)
  )
  whole = loss_of(obj, params)
  parts = [
    loss_of(obj, params, {k: v[i : i + 2] for k, v in BATCH.items()})
    for i in (0, 2)
  ]
  for field in ('sums', 'counts'):
    total = sum(getattr(p, field) for p in parts)
    np.testing.assert_allclose(total, getattr(whole, field), rtol=1e-5)
  steady = loss_of(obj, params, train=False)
  assert abs(float(steady.sums[0] - whole.sums[0])) > 1e-3


def test_dual_masking_ignores_what_the_encoder_saw(params):
  dual = objective(decoder_mask=partial(masking.running_cell, ratio=0.5))
  video = jnp.asarray(BATCH['video']) / 255
  pred = jax.eval_shape(
    dual.reconstruct, params, video, jax.random.split(RNG, 4)
  ).pred
  assert pred.shape[1] == 16
  hidden = loss_of(dual, params).counts
  assert 0 < float(hidden[0]) < 4 * 16
  # Decoding everything that is hidden is the loss of version 1.
  complement = objective(
    mask=lambda keys, grid: ~FIXED[: len(keys)],
    decoder_mask=lambda keys, grid: FIXED[: len(keys)],
  )
  plain = objective(mask=lambda keys, grid: ~FIXED[: len(keys)])
  a, b = loss_of(complement, params), loss_of(plain, params)
  np.testing.assert_allclose(a.sums, b.sums, rtol=1e-5)
  np.testing.assert_allclose(a.counts, b.counts)


FIXED = np.tile(np.arange(32) % 4 == 0, (4, 1))


def test_embed_sees_all_tokens(params):
  obj = objective()
  out = jax.jit(obj.embed)(params, BATCH)
  assert out.shape == (4, 16)
  assert out.dtype == jnp.float32
  one = {k: v[1:2] for k, v in BATCH.items()}
  assert isinstance(obj, base.EmbedsTokens)
  tokens = jax.jit(obj.tokens)(params, one)
  assert tokens.shape == (1, 32, 16)
  np.testing.assert_allclose(tokens[0].mean(0), out[1], atol=1e-5)


def test_visualise(params):
  obj = objective(decoder_mask=partial(masking.running_cell, ratio=0.5))
  out = jax.jit(obj.visualise)(params, {}, BATCH, RNG)
  assert set(out) == {'original', 'masked', 'reconstruction'}
  assert {(x.dtype.name, x.shape) for x in out.values()} == {
    ('uint8', BATCH['video'].shape)
  }
  np.testing.assert_array_equal(out['original'], BATCH['video'])
  grey = np.asarray(patchify(out['masked'], (2, 4, 4)) == 128).all(-1)
  assert grey.sum(1).tolist() == [24] * 4
  for name in ('masked', 'reconstruction'):
    cut = patchify(out[name], (2, 4, 4))
    same = np.asarray(cut == patchify(BATCH['video'], (2, 4, 4))).all(-1)
    np.testing.assert_array_equal(same, ~grey)


def test_images(params):
  out = loss_of(objective(), params, batch_of(frames=1))
  assert out.counts.tolist() == [4 * 12]
  assert np.isfinite(out.sums).all()


@pytest.mark.parametrize(
  ('kwargs', 'batch', 'message'),
  [
    ({}, batch_of(frames=3), 'frames .*found 3 .*`objective.encoder.tubelet`'),
    ({}, batch_of(side=18), 'rows .*found 18 .*`objective.encoder.patch`'),
    (
      dict(mask=partial(masking.tube, ratio=1.0)),
      BATCH,
      'leave at least 1 .*`objective.mask.ratio`',
    ),
    (
      dict(decoder_mask=masking.running_cell),
      batch_of(side=12),
      'even token grid, found 3x3',
    ),
    ({}, {'video': np.zeros((2, 4, 16, 16, 1)), 'row': np.arange(2)}, 'data'),
  ],
)
def test_errors(params, kwargs, batch, message):
  with pytest.raises(ValueError, match=message):
    loss_of(objective(**kwargs), params, batch)


def test_an_encoder_that_pools_is_refused():
  with pytest.raises(ValueError, match=r'`objective\.encoder.pooling`'):
    objective(dict(pooling='mean'))
