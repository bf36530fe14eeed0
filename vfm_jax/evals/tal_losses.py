"""Compare what a temporal detector finds with what it should find."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vfm_jax.models.temporal_localization import Found
from vfm_jax.ops import segments as segments_lib
from vfm_jax.ops.focal import sigmoid_focal


class Losses(NamedTuple):
  """Hold the losses of a batch, each f32 [].

  Attributes:
    total: classification + weight * regression.
    classification: focal loss over the normaliser.
    regression: distance-IoU loss over the normaliser.
    normaliser: its new value.
  """

  total: jax.Array
  classification: jax.Array
  regression: jax.Array
  normaliser: jax.Array


def targets(
  batch: Mapping[str, Any],
  points: segments_lib.Points,
  num_classes: int,
  radius: float | None,
) -> tuple[jax.Array, jax.Array]:
  """Return class targets [B, N, C] and offset targets [B, N, 2] of a batch."""

  def one(segments, labels, valid):
    return segments_lib.assign(
      points, segments, labels, valid, num_classes=num_classes, radius=radius
    )

  return jax.vmap(one)(batch['segments'], batch['labels'], batch['valid'])


def losses(
  found: Found,
  classes: jax.Array,
  offsets: jax.Array,
  normaliser: jax.Array,
  *,
  smoothing: float = 0.1,
  weight: float = 2.0,
  momentum: float = 0.9,
) -> Losses:
  """Compare what was found with the targets (ActionFormer, section 3.3).

  With n positive points in the batch, the normaliser becomes momentum *
  normaliser + (1 - momentum) * max(n, 1), and both sums are divided by it.

  Args:
    found: of a batch.
    classes: f32 [B, N, C] targets over all levels.
    offsets: f32 [B, N, 2] targets over all levels.
    normaliser: f32 [] before this batch.
    smoothing: e; targets become y (1 - e) + e / (C + 1).
    weight: of the regression.
    momentum: of the normaliser.
  """
  logits, distances, masks = (jnp.concatenate(x, axis=1) for x in found)
  positive = masks & (classes.sum(-1) > 0)
  count = jnp.maximum(positive.sum(), 1).astype(jnp.float32)
  normaliser = momentum * normaliser + (1 - momentum) * count
  soft = classes * (1 - smoothing) + smoothing / (classes.shape[-1] + 1)
  focal = jnp.where(masks[..., None], sigmoid_focal(logits, soft), 0).sum()
  # Points without a target compare with themselves: no loss and no gradient.
  truth = jnp.where(positive[..., None], offsets, 1.0)
  distances = jnp.where(positive[..., None], distances, 1.0)
  diou = segments_lib.diou_loss(distances, truth).sum()
  classification, regression = focal / normaliser, diou / normaliser
  total = classification + weight * regression
  return Losses(total, classification, regression, normaliser)
