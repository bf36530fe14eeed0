"""Check how boxes are compared."""

import jax.numpy as jnp
import numpy as np

from vfm_jax.ops import boxes


def test_corners():
  out = boxes.corners(jnp.array([0.5, 0.25, 0.2, 0.5]))
  np.testing.assert_allclose(out, [0.4, 0.0, 0.6, 0.5], atol=1e-6)


def test_generalised_iou():
  a = jnp.array([0.0, 0.0, 0.5, 0.5])
  b = jnp.array(
    [
      [0.0, 0.0, 0.5, 0.5],
      [0.25, 0.0, 0.75, 0.5],
      # No overlap: the hull is twice the union.
      [0.5, 0.5, 1.0, 1.0],
      [0.2, 0.2, 0.2, 0.2],
    ]
  )
  expected = [1, 1 / 3, -0.5, 0]
  np.testing.assert_allclose(boxes.generalised_iou(a, b), expected, atol=1e-6)
