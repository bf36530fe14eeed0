import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.models.encoders import VideoViT
from vfm_jax.models.vjepa import (
  ActionPredictor,
  LatentPredictor,
  frame_causal,
)
from vfm_jax.nn import transformer

GRID = (2, 2, 2)
SHAPE = dict(grid=GRID, built_grid=GRID)
X = jax.random.normal(jax.random.key(0), (1, 3, 12))
VISIBLE = jnp.array([[0, 2, 5]])
TARGET = jnp.array([[1, 3, 4, 6, 7]])


def count(model, *args, **kwargs):
  init = lambda key, *x: model.init(key, *x, **kwargs)  # noqa: E731
  params = jax.eval_shape(init, jax.random.key(0), *args)['params']
  return sum(p.size for p in jax.tree.leaves(params))


@pytest.mark.parametrize(
  ('size', 'fields', 'total'),
  [
    ('B', {}, 86_236_416),
    ('L', {}, 303_885_312),
    ('H', {}, 631_648_000),
    ('g', dict(heads=22, patch=16), 1_012_173_952),
  ],
)
def test_encoder_counts(size, fields, total):
  video = jax.ShapeDtypeStruct((1, 16, 224, 224, 3), jnp.float32)
  for positions in ('sincos_3d', 'rope_3d_tiled'):
    model = VideoViT(
      size=size, positions=positions, qkv_bias='full', scan=True, **fields
    )
    assert count(model, video) == total


@pytest.mark.parametrize(
  ('width', 'fields', 'total'),
  [
    (1024, {}, 22_082_944),
    (1280, {}, 22_279_808),
    (1024, dict(mask_tokens=10, positions='rope_3d'), 22_086_016),
    (1280, dict(mask_tokens=10, positions='rope_3d'), 22_282_880),
    (1408, dict(mask_tokens=10, positions='rope_3d'), 22_381_312),
  ],
)
def test_predictor_counts(width, fields, total):
  x = jnp.zeros((1, 3, width))
  model = LatentPredictor(scan=True, **fields)
  assert count(model, x, VISIBLE, TARGET, **SHAPE) == total


@pytest.mark.parametrize(
  'positions',
  [pytest.param('sincos_3d', marks=pytest.mark.slow), 'rope_3d_tiled'],
)
def test_permuted_targets_permute_the_output(positions):
  model = LatentPredictor(width=24, depth=2, heads=2, positions=positions)
  init = jax.jit(lambda key: model.init(key, X, VISIBLE, TARGET, **SHAPE))
  variables = init(jax.random.key(1))
  assert not np.any(variables['params']['mask_tokens'])
  apply = jax.jit(
    lambda target: model.apply(variables, X, VISIBLE, target, **SHAPE)
  )
  out = apply(TARGET)
  assert out.shape == (1, 5, 12)
  order = jnp.array([3, 0, 4, 1, 2])
  np.testing.assert_allclose(apply(TARGET[:, order]), out[:, order], atol=1e-6)
  # Two targets at one place are one.
  twice = apply(jnp.array([[1, 1, 4, 6, 7]]))
  np.testing.assert_allclose(twice[:, 0], twice[:, 1], atol=1e-6)
  assert np.abs(twice[:, 0] - twice[:, 2]).max() > 1e-5


def test_there_is_no_such_mask_token():
  model = LatentPredictor(width=24, depth=1, heads=2)
  with pytest.raises(ValueError, match=r'below 2, found 2; change `objective'):
    count(model, X, VISIBLE, TARGET, mask_token=2, **SHAPE)


@pytest.mark.parametrize(
  'scan', [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_initial_branches_shrink_with_the_layer(scan):
  model = VideoViT(
    width=64,
    depth=2,
    heads=2,
    patch=8,
    image_size=8,
    frames=2,
    init_scheme='normal',
    scan=scan,
    gate='two_thirds' if scan else 'none',
  )
  video = jnp.zeros((1, 2, 8, 8, 3))
  params = jax.jit(model.init)(jax.random.key(0), video)['params']
  assert float(params['patch_embed']['kernel'].std()) == pytest.approx(
    0.02, rel=0.05
  )
  scaled = transformer.rescale_residual({'encoder': params})['encoder']
  if scan:
    scaled = transformer.unstack_blocks(scaled)
  for i in (0, 1):
    block = scaled[f'blocks_{i}']
    for kernel in (block['attn']['proj'], block['mlp']['fc2']):
      assert float(kernel['kernel'].std()) == pytest.approx(
        0.02 / np.sqrt(2 * i + 2), rel=0.05
      )
    assert float(block['mlp']['fc1']['kernel'].std()) == pytest.approx(
      0.02, rel=0.05
    )


@pytest.mark.parametrize(
  ('gate', 'width'), [('two_thirds', 176), ('full', 256)]
)
def test_gated_mlps_have_three_kernels(gate, width):
  block = transformer.Block(heads=2, mlp_width=256, gate=gate)
  x = jax.ShapeDtypeStruct((1, 3, 64), jnp.float32)
  mlp = jax.eval_shape(block.init, jax.random.key(0), x)['params']['mlp']
  shapes = [mlp[f'fc{i}']['kernel'].shape for i in (1, 2, 3)]
  assert shapes == [(64, width), (64, width), (width, 64)]


def test_actions_reach_their_own_and_later_frames_only():
  model = ActionPredictor(width=24, depth=2, heads=2, extrinsics=True)
  grid, rng = (3, 2, 2), np.random.default_rng(0)
  tokens = rng.normal(size=(1, 12, 8)).astype('f')
  given = [rng.normal(size=(1, 3, k)).astype('f') for k in (7, 7, 6)]
  init = jax.jit(lambda key: model.init(key, tokens, *given, grid=grid))
  variables = init(jax.random.key(0))
  apply = jax.jit(lambda *x: model.apply(variables, *x, grid=grid))
  out = apply(tokens, *given)
  assert out.shape == tokens.shape
  given[0][:, 1] += 1.0
  moved = np.abs(apply(tokens, *given) - out).max((0, 2)).reshape(3, 4)
  assert (moved[0] == 0).all()
  assert (moved[1:] > 0).all()
  seen = frame_causal(3, 2)
  assert seen[2].tolist() == [True] * 4 + [False] * 2
  with pytest.raises(ValueError, match='takes them, found none'):
    count(model, tokens, *given[:2], grid=grid)
  with pytest.raises(ValueError, match=r'expected 8 tokens.*found 12'):
    count(model, tokens, *given, grid=(2, 2, 2))
