"""Check the mixer against plain convolutions, and what each branch sees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.nn import mixer

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 8, 8, 16)).astype(np.float32)


def shapes(module, x=X):
  return jax.eval_shape(module.init, jax.random.key(0), x)['params']


def lively(module, x=X, scale=0.3):
  draw = lambda s: scale * RNG.normal(size=s.shape).astype(np.float32)  # noqa: E731
  return jax.tree.map(draw, shapes(module, x))


@functools.partial(jax.jit, static_argnums=0)
def run(module, params, x):
  return module.apply({'params': params}, x)


def reference(params, x, high, low, pool, head_dim):
  """Compute the mixer by XLA's own convolutions and poolings."""

  def depthwise(x, kernel):
    return jax.lax.conv_general_dilated(
      x,
      kernel[:, :, None],
      (1, 1),
      'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=x.shape[-1],
      precision='highest',
    )

  gelu = functools.partial(jax.nn.gelu, approximate=False)
  first, second = x[..., : high // 2], x[..., high // 2 : high]
  a = first @ params['high_conv']['kernel']
  a = gelu(depthwise(a, params['high_depthwise']['kernel']))
  window = (1, 3, 3, 1)
  b = jax.lax.reduce_window(
    second, -jnp.inf, jax.lax.max, window, (1, 1, 1, 1), 'SAME'
  )
  p = params['high_pool']
  b = gelu(b @ p['kernel'] + p['bias'])
  window = (1, pool, pool, 1)
  z = jax.lax.reduce_window(
    x[..., high:], 0.0, jax.lax.add, window, window, 'VALID'
  )
  z = z / pool**2
  tokens = z.reshape(len(x), -1, low)
  p = params['qkv']
  qkv = jnp.einsum('bnd,dthe->tbnhe', tokens, p['kernel'])
  q, k, v = qkv + p['bias'][:, None, None]
  assert q.shape[-1] == head_dim
  z = jax.nn.dot_product_attention(q, k, v).reshape(z.shape)
  z = jax.image.resize(z, (*x.shape[:3], low), 'nearest')
  h = jnp.concatenate([a, b, z], -1)
  h = h + depthwise(h, params['fuse_depthwise']['kernel'])
  p = params['fuse']
  return h @ p['kernel'] + p['bias']


@pytest.mark.parametrize('pool', [pytest.param(1, marks=pytest.mark.slow), 2])
def test_against_plain_operations(pool):
  module = mixer.Mixer(0.5, pool, 4)
  params = lively(module)
  want = jax.jit(reference, static_argnums=(2, 3, 4, 5))(
    params, X, 8, 8, pool, 4
  )
  np.testing.assert_allclose(run(module, params, X), want, atol=1e-5)


@pytest.mark.parametrize('share', [0.0, 0.1, 0.5, 0.9, 1.0])
def test_all_shares_keep_the_shape(share):
  module = mixer.Mixer(share, 2, 4)
  out, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), X)
  assert out.shape == X.shape
  names = set(variables['params'])
  assert ('qkv' in names) == (share < 1)
  high = {'high_conv', 'high_depthwise', 'high_pool'}
  assert names & high == (high if share else set())


def test_split_and_the_known_values():
  assert mixer.split(256, mixer.SHARES[0][1]) == (160, 96)  # 5/8
  assert mixer.split(256, mixer.SHARES[3][1]) == (64, 192)  # 1/4
  assert mixer.split(512, mixer.SHARES[0][3]) == (128, 384)  # 1 : 3
  assert mixer.split(512, mixer.SHARES[3][3]) == (32, 480)  # 1 : 15
  assert mixer.split(96, 0.0) == (0, 96)
  assert mixer.split(90, 1.0) == (90, 0)
  for width in (128, 256, 384, 512, 768):
    for shares in mixer.SHARES:
      for share in shares:
        high, low = mixer.split(width, share)
        assert high + low == width
        assert low % 32 == 0
        assert high % 2 == 0
        assert min(high, low) >= 32
  for width, share in ((40, 0.5), (31, 1.0), (100, 0.0), (101, 0.5)):
    with pytest.raises(ValueError, match=r'denoiser\.mixing\.head_dim'):
      mixer.split(width, share)


def test_shares_fall_with_depth_and_noise():
  table = np.array(mixer.SHARES)
  assert (np.diff(table, axis=0) < 0).all()
  assert (np.diff(table, axis=1) < 0).all()
  assert mixer.stages(2).shares == mixer.SHARES[2]
  made = mixer.thirds(1).by_depth(6)
  shares = [m().share for m in made]
  assert shares == [0.5, 0.5, 0.375, 0.375, 0.1875, 0.1875]


def test_settings_that_fit_nothing():
  with pytest.raises(ValueError, match=r'denoiser\.mixing\.pools'):
    mixer.Mixing((0.5, 0.5), (1,))
  with pytest.raises(ValueError, match='from 0 to 1'):
    mixer.Mixing((1.5,), (1,))
  with pytest.raises(ValueError, match=r'sides 3 divides.*8 x 8'):
    shapes(mixer.Mixer(0.5, 3, 4))


def test_attention_alone_does_not_know_places():
  module = mixer.Mixer(0.0, 1, 4)
  params = lively(module)
  params['fuse_depthwise']['kernel'] *= 0
  order = RNG.permutation(64)
  move = lambda x: x.reshape(2, 64, 16)[:, order].reshape(x.shape)  # noqa: E731
  got = run(module, params, move(X))
  np.testing.assert_allclose(got, move(run(module, params, X)), atol=1e-5)


def test_convolution_is_local_and_attention_is_not():
  moved = X.copy()
  moved[:, 4, 3] += 1.0
  reached = {}
  for share in (1.0, 0.5):
    module = mixer.Mixer(share, 1, 4)
    params = lively(module)
    change = np.abs(run(module, params, moved) - run(module, params, X))
    reached[share] = change.max((0, 3)) > 1e-6
  near = np.zeros((8, 8), bool)
  near[2:7, 1:6] = True  # 3 x 3, and 3 x 3 again
  np.testing.assert_array_equal(reached[1.0], near)
  assert reached[0.5].all()


def test_the_highest_frequencies_pass_through_convolution_alone():
  """Means over squares leave nothing of a chequerboard."""
  board = np.indices((8, 8)).sum(0)[:, :, None] % 2 - 0.5
  change = {}
  for share in (0.0, 1.0):
    module = mixer.Mixer(share, 2, 4)
    params = lively(module)
    same, more = (run(module, params, x) for x in (X, X + np.float32(board)))
    change[share] = np.abs(more - same).max()
  assert change[0.0] < 1e-5
  assert change[1.0] > 0.1


def test_block_adds_to_its_input():
  mixing = mixer.Mixing((0.5,), (2,), 4)
  block = mixer.MixerBlock(mixing.mixer(0), mlp_ratio=2.0)
  params = lively(block)
  assert set(params) == {'norm1', 'mixer', 'norm2', 'mlp'}
  assert params['mlp']['fc1']['kernel'].shape == (16, 32)
  for name in ('mixer', 'mlp'):
    last = params[name]['fuse' if name == 'mixer' else 'fc2']
    last['kernel'], last['bias'] = 0 * last['kernel'], 0 * last['bias']
  np.testing.assert_allclose(run(block, params, X), X, atol=1e-6)
  without = mixer.MixerBlock(mixing.mixer(0), mlp_ratio=0.0)
  assert set(shapes(without)) == {'norm1', 'mixer'}
