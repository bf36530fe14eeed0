import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.models.autoencoder import AutoencoderKL

TINY = AutoencoderKL(widths=(8, 16), layers=1, groups=4)


@pytest.fixture(scope='module')
def params():
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda s: 0.1 * rng.standard_normal(s.shape, np.float32), TINY.template()
  )


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, x):
  def apply(x, method):
    return model.apply({'params': params}, x, method=method)

  moments = apply(x, 'encode')
  return moments, apply(moments.mean, 'decode')


def test_shapes_types_and_limits(params):
  rng = np.random.default_rng(0)
  x = rng.uniform(-1, 1, (2, 8, 12, 3)).astype(np.float32)
  moments, out = run(TINY, params, x)
  assert moments.mean.shape == moments.logvar.shape == (2, 4, 6, 4)
  np.testing.assert_allclose(moments.std**2, np.exp(moments.logvar), rtol=1e-5)
  assert out.shape == x.shape
  loud, _ = run(TINY, jax.tree.map(lambda p: 100 * p, params), x)
  assert loud.logvar.min() == -30
  assert loud.logvar.max() == 20
  low, rough = run(TINY.clone(dtype='bfloat16'), params, x)
  assert low.mean.dtype == rough.dtype == jnp.float32
  scale = np.abs(moments.mean).max()
  np.testing.assert_allclose(low.mean, moments.mean, atol=0.05 * scale)


def test_size_of_stable_diffusion():
  shapes = jax.tree.leaves(AutoencoderKL().template())
  assert sum(x.size for x in shapes) == 83_653_863


def test_optional_parts():
  template = AutoencoderKL(
    widths=(8, 16),
    layers=1,
    groups=4,
    quant=False,
    post_quant=False,
    mid_attention=False,
  ).template()
  assert template.keys() == {'encoder', 'decoder'}
  assert 'attn' not in template['encoder']['mid']


def test_zeros_are_added_below_and_right_only():
  # With the corner of the kernel alone, the strided convolution gives every
  # second pixel from the first one on: nothing is padded before it.
  x = np.zeros((1, 4, 4, 1), np.float32)
  x[0, 0, 0] = x[0, 2, 2] = 1
  tiny = AutoencoderKL(widths=(4, 4), layers=1, groups=4, channels=1)
  weights = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), tiny.template())
  encoder = weights['encoder']
  encoder['conv_in']['kernel'][1, 1, :, 0] = 1
  encoder['shrink_0']['kernel'][0, 0, 0, 0] = 1

  @jax.jit
  def shrunk(x):
    _, kept = tiny.apply(
      {'params': weights},
      x,
      method='encode',
      capture_intermediates=lambda module, _: module.name == 'shrink_0',
      mutable=['intermediates'],
    )
    return jax.tree.leaves(kept)

  (found,) = shrunk(x)
  found = found[0, :, :, 0]
  np.testing.assert_array_equal(found, np.eye(2))


def test_wrong_input(params):
  def apply(x, method):
    TINY.apply({'params': params}, x, method=method)

  with pytest.raises(ValueError, match=r'multiples of 2, found \(1, 7, 8, 3\)'):
    apply(np.zeros((1, 7, 8, 3)), 'encode')
  with pytest.raises(ValueError, match=r'found \(1, 8, 8, 1\)'):
    apply(np.zeros((1, 8, 8, 1)), 'encode')
  with pytest.raises(ValueError, match=r'expected latents \[B, h, w, 4\]'):
    apply(np.zeros((1, 4, 4, 3)), 'decode')
  with pytest.raises(ValueError, match=r'`vae.widths` that 3 groups divide'):
    AutoencoderKL(widths=(8,), groups=3).template()
