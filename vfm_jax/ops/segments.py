"""Assign temporal segments to points in time, and compare segments.

A segment (start, end) is described at a point t by its offsets (t - start,
end - t), both 0 or more where t lies within. Everything is in steps of the
finest level; level l of a pyramid has a point every 2^l steps.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Range = tuple[float, float]

# Segments whose lengths differ by no more are equally short.
_SAME_LENGTH = 1e-3


class Points(NamedTuple):
  """Hold the points of all levels, the finest first; each f32 [N].

  Attributes:
    at: time of the point, a multiple of its stride.
    low: smallest distance to the farther end of a segment that it takes.
    high: largest such distance.
    stride: steps between the points of its level.
  """

  at: np.ndarray
  low: np.ndarray
  high: np.ndarray
  stride: np.ndarray


def points(length: int, ranges: Sequence[Range]) -> Points:
  """Return the points of a pyramid over `length` steps, a level a range.

  Raises:
    ValueError: the coarsest level does not divide the length.
  """
  coarsest = 2 ** (len(ranges) - 1)
  if length % coarsest:
    raise ValueError(
      f'{len(ranges)} levels need a length that {coarsest} divides, found '
      f'{length}'
    )
  parts = []
  for level, (low, high) in enumerate(ranges):
    at = np.arange(0, length, 2**level, dtype=np.float32)
    ones = np.ones_like(at)
    parts.append((at, low * ones, high * ones, 2**level * ones))
  return Points(*(np.concatenate(x) for x in zip(*parts, strict=True)))


def assign(
  points: Points,
  segments: jax.Array,
  labels: jax.Array,
  valid: jax.Array,
  *,
  num_classes: int,
  radius: float | None = 1.5,
) -> tuple[jax.Array, jax.Array]:
  """Return what each point has to predict (ActionFormer, section 3.3).

  A point takes a segment whose farther end is low to high steps away, both
  included, if it lies strictly within it and within `radius` strides of its
  centre. Of several it takes the shortest; its classes are those of all that
  are as short, to 1e-3 steps.

  Args:
    points: of all levels, [N].
    segments: f32 [G, 2] start and end in steps.
    labels: int [G].
    valid: bool [G]; other rows are padding.
    num_classes: C.
    radius: strides from the centre; None takes all points within a segment.

  Returns:
    classes f32 [N, C], 0 or 1, all 0 for a point that takes no segment; and
    offsets f32 [N, 2] in strides of the point, of no meaning for such a point.
  """
  start, end = segments[None, :, 0], segments[None, :, 1]
  at, stride = (jnp.asarray(x)[:, None] for x in (points.at, points.stride))
  offsets = jnp.stack([at - start, end - at], axis=-1)
  if radius is None:
    inside = offsets.min(-1) > 0
  else:
    centre = 0.5 * (start + end)
    low = jnp.maximum(centre - radius * stride, start)
    high = jnp.minimum(centre + radius * stride, end)
    inside = (at - low > 0) & (high - at > 0)
  farther = offsets.max(-1)
  in_range = (farther >= points.low[:, None]) & (
    farther <= points.high[:, None]
  )
  length = jnp.where(inside & in_range & valid[None], end - start, jnp.inf)
  shortest = length.min(-1, keepdims=True)
  taken = (length <= shortest + _SAME_LENGTH) & jnp.isfinite(length)
  classes = taken.astype(jnp.float32) @ jax.nn.one_hot(labels, num_classes)
  first = length.argmin(-1)[:, None, None]
  nearest = jnp.take_along_axis(offsets, first, axis=1)[:, 0]
  return jnp.minimum(classes, 1.0), nearest / stride


def iou_loss(
  predicted: jax.Array, truth: jax.Array, *, eps: float = 1e-8
) -> jax.Array:
  """Return 1 - IoU of segments around the same point.

  In one dimension segments that share a point have no gap, so that their
  generalised IoU is their IoU.

  Args:
    predicted: [..., 2] offsets, 0 or more.
    truth: [..., 2] offsets, 0 or more.
    eps: bound below on the union.
  """
  # Of equal ends the truth is taken, as in the release: a segment of no length
  # that equals the truth has no gradient then, instead of one of 1 / eps.
  shared = jnp.where(predicted < truth, predicted, truth).sum(-1)
  union = predicted.sum(-1) + truth.sum(-1) - shared
  return 1.0 - shared / jnp.maximum(union, eps)


def diou_loss(
  predicted: jax.Array, truth: jax.Array, *, eps: float = 1e-8
) -> jax.Array:
  """Return the distance-IoU loss of segments around the same point.

  1 - IoU + (distance of the centres / length of the hull)^2 (Zheng et al.
  2020, in one dimension); arguments as in `iou_loss`.
  """
  hull = jnp.maximum(predicted, truth).sum(-1)
  centre = 0.5 * (predicted[..., 1] - predicted[..., 0])
  distance = centre - 0.5 * (truth[..., 1] - truth[..., 0])
  penalty = jnp.square(distance / jnp.maximum(hull, eps))
  return iou_loss(predicted, truth, eps=eps) + penalty
