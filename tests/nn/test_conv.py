"""Check the layers of feature networks against XLA's convolutions."""

import jax
import numpy as np
import pytest

from vfm_jax.nn import conv


@pytest.mark.parametrize(
  ('size', 'kernel', 'stride'), [(8, 3, 1), (8, 5, 2), (7, 3, 2), (7, 5, 1)]
)
def test_depthwise(size, kernel, stride):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, size, size + 3, 6)).astype(np.float32)
  layer = conv.DepthwiseNorm(kernel, stride, act=lambda y: y)
  params = layer.init(jax.random.key(0), x)
  want = jax.lax.conv_general_dilated(
    x,
    params['params']['kernel'][:, :, None],
    (stride, stride),
    'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=6,
  ) / np.sqrt(1.001)
  np.testing.assert_allclose(layer.apply(params, x), want, atol=1e-5)


def test_norm_uses_what_was_recorded():
  norm = {'scale': 2.0, 'bias': 1.0, 'mean': 3.0, 'var': 4.0}
  params = {'params': {k: np.full(1, v, np.float32) for k, v in norm.items()}}
  got = conv.FrozenNorm(epsilon=0.0).apply(params, np.float32([[5.0]]))
  np.testing.assert_allclose(got, [[3.0]])
