"""Compare boxes in an image, in coordinates from 0 to 1."""

import jax
import jax.numpy as jnp


def corners(boxes: jax.Array) -> jax.Array:
  """Return x1, y1, x2, y2 of boxes [..., 4] of centre x, y, width, height."""
  centre, size = boxes[..., :2], boxes[..., 2:]
  return jnp.concatenate([centre - size / 2, centre + size / 2], axis=-1)


def generalised_iou(a: jax.Array, b: jax.Array) -> jax.Array:
  """Return the generalised IoU, from -1 to 1, of boxes that broadcast.

  IoU - (hull - union) / hull (Rezatofighi et al. 2019, algorithm 1).

  Args:
    a: [..., 4] corners.
    b: [..., 4] corners.
  """
  inter = _area(_low(a, b, jnp.maximum), _high(a, b, jnp.minimum))
  hull = _area(_low(a, b, jnp.minimum), _high(a, b, jnp.maximum))
  union = _area(a[..., :2], a[..., 2:]) + _area(b[..., :2], b[..., 2:]) - inter
  # Boxes without area are as far from any other as can be.
  tiny = 1e-9
  iou = inter / jnp.maximum(union, tiny)
  return iou - (hull - union) / jnp.maximum(hull, tiny)


def _low(a, b, of):
  return of(a[..., :2], b[..., :2])


def _high(a, b, of):
  return of(a[..., 2:], b[..., 2:])


def _area(low, high):
  return jnp.maximum(high - low, 0.0).prod(-1)
