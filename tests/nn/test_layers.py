import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.nn import layers
from vfm_jax.ops.tokens import patchify


def test_initialisers_have_their_statistics():
  key = jax.random.key(0)
  x = layers.trunc_normal(0.02, 0.02)(key, (20_000,))
  assert np.abs(x).max() <= 0.02
  # A normal cut at one sigma keeps 0.5396 of its deviation.
  assert float(x.std()) == pytest.approx(0.02 * 0.5396, rel=0.02)
  x = layers.trunc_normal(0.02, 2.0)(key, (20_000,))
  assert float(x.std()) == pytest.approx(0.02, rel=0.02)
  x = layers.uniform_fan_in(16)(key, (20_000,))
  assert 0.24 < float(np.abs(x).max()) <= 0.25


def test_drop_path_keeps_the_mean_and_is_keyed_by_example():
  keys = jax.random.split(jax.random.key(0), 4000)
  out = layers.drop_path(jnp.ones((4000, 1, 2)), 0.25, keys)
  assert set(np.unique(out).tolist()) == {0.0, np.float32(1 / 0.75).item()}
  assert float(out.mean()) == pytest.approx(1.0, abs=0.03)
  part = layers.drop_path(jnp.ones((10, 1, 2)), 0.25, keys[90:100])
  np.testing.assert_array_equal(part, out[90:100])


def test_layer_norm_and_its_accuracy_far_from_zero():
  x = 1000 + jax.random.normal(jax.random.key(0), (3, 64))
  out, _ = layers.LayerNorm().init_with_output(jax.random.key(0), x)
  x = np.asarray(x, np.float64)
  want = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
  np.testing.assert_allclose(out, want, atol=2e-4)


def test_patch_embed_is_a_convolution():
  video = jax.random.normal(jax.random.key(0), (2, 4, 8, 8, 3))
  patches = patchify(video, (2, 4, 4))
  module = layers.PatchEmbed(5)
  out, variables = module.init_with_output(jax.random.key(1), patches)
  params = variables['params']
  want = jax.lax.conv_general_dilated(
    video,
    params['kernel'].reshape(2, 4, 4, 3, 5),
    (2, 4, 4),
    'VALID',
    dimension_numbers=('NDHWC', 'DHWIO', 'NDHWC'),
  )
  want = want.reshape(2, -1, 5) + params['bias']
  np.testing.assert_allclose(out, want, atol=1e-5)
  assert np.abs(params['bias']).max() > 0
  assert np.abs(params['kernel']).max() <= 1 / np.sqrt(96)


def test_mlp_uses_the_exact_gelu():
  x = jnp.linspace(-3, 3, 8)[None]
  module = layers.Mlp(8)
  variables = module.init(jax.random.key(0), x)
  eye = {
    n: {'kernel': jnp.eye(8), 'bias': jnp.zeros(8)} for n in ('fc1', 'fc2')
  }
  want = x * 0.5 * (1 + jax.scipy.special.erf(x / np.sqrt(2)))
  out = module.apply({'params': eye}, x)
  np.testing.assert_allclose(out, want, atol=1e-6)
  bound = np.sqrt(6 / 16)
  kernel = variables['params']['fc1']['kernel']
  assert 0.8 * bound < np.abs(kernel).max() <= bound


def test_mlp_with_the_tanh_gelu():
  x = jnp.linspace(-3, 3, 8)[None]
  eye = {
    n: {'kernel': jnp.eye(8), 'bias': jnp.zeros(8)} for n in ('fc1', 'fc2')
  }
  out = layers.Mlp(8, gelu='tanh').apply({'params': eye}, x)
  inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
  np.testing.assert_allclose(out, x * 0.5 * (1 + np.tanh(inner)), atol=1e-6)


def test_layers_without_the_usual_parameters():
  x = jax.random.normal(jax.random.key(0), (3, 4, 12))
  out, variables = layers.LayerNorm(affine=False).init_with_output(
    jax.random.key(0), x
  )
  assert not variables
  np.testing.assert_allclose(
    out, layers.LayerNorm().init_with_output(jax.random.key(0), x)[0], atol=1e-6
  )
  module = layers.PatchEmbed(500, init_scheme='xavier')
  params = module.init(jax.random.key(1), x)['params']
  bound = np.sqrt(6 / 512)
  assert 0.98 * bound < np.abs(params['kernel']).max() <= bound
  assert not np.any(params['bias'])
