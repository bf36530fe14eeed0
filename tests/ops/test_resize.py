"""Check the two grids of bilinear resizing on a ramp."""

import jax
import numpy as np

from vfm_jax.ops.resize import bilinear


def test_grids():
  ramp = np.broadcast_to(np.array([0.0, 1.0], np.float32), (1, 3, 2))
  x = ramp[..., None]
  corner = np.asarray(bilinear(x, 4, 'corner'))[0, 0, :, 0]
  np.testing.assert_allclose(corner, [0, 0.5, 1, 1])
  center = np.asarray(bilinear(x, 4, 'center'))[0, 0, :, 0]
  np.testing.assert_allclose(center, [0, 0.25, 0.75, 1])


def test_center_is_the_usual_resize():
  x = np.random.default_rng(0).random((2, 5, 7, 3), np.float32)
  want = jax.image.resize(x, (2, 9, 9, 3), 'linear')
  np.testing.assert_allclose(bilinear(x, 9), want, atol=1e-6)
