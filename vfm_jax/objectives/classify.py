"""Fine-tune an encoder on labels (the recipe of VideoMAE)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vfm_jax.models.encoders import VideoViT
from vfm_jax.nn import layers
from vfm_jax.objectives import base, pixels
from vfm_jax.objectives.pixels import IMAGENET_MEAN, IMAGENET_STD
from vfm_jax.ops import mixing
from vfm_jax.ops.keys import fold

# Beyond all rows: the key of what a whole batch shares.
_MIX_ROW = 2**31 - 2


@dataclasses.dataclass(frozen=True)
class Classify:
  """Tell the class of a clip, with soft targets.

  The loss is the cross-entropy with smoothed, and in training mixed, labels.
  One draw of `mix` serves the whole batch, and the partner of an example is
  half a batch away; the official loaders take the batch in reverse. Batches
  are shuffled, so that both pair at random, but only ours stays the same when
  the batch is cut into microbatches.

  Attributes:
    encoder: pools and has a head, as in `VideoViT(pooling='mean',
      norm='pooled', num_classes=400, init_scheme='finetune')`.
    label: name of the label.
    mix: draws how pairs are mixed, of `ops.mixing`; None mixes nothing.
    smoothing: of the labels, in training.
    head_drop: dropout of the pooled features before the head.
    mean: per-channel mean of the encoder's input, of pixels in [0, 1].
    std: per-channel standard deviation.
  """

  encoder: VideoViT
  label: str
  mix: Callable[..., Any] | None = mixing.mixup_or_cutmix
  smoothing: float = 0.1
  head_drop: float = 0.0
  mean: tuple[float, float, float] = IMAGENET_MEAN
  std: tuple[float, float, float] = IMAGENET_STD

  def __post_init__(self):
    """Refuse settings that mean nothing."""
    if not self.encoder.num_classes:
      raise ValueError(
        'classification needs `objective.encoder.num_classes` > 0, found '
        f'{self.encoder.num_classes}'
      )
    for name in ('smoothing', 'head_drop'):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(
          f'objective.{name} must lie in [0, 1), found {getattr(self, name)}'
        )

  def init(
    self, rng: jax.Array, batch: base.Batch
  ) -> tuple[base.PyTree, base.PyTree]:
    """Return the parameters {'encoder'} and no other state."""
    video = pixels.pixels(batch)
    return {'encoder': self.encoder.init(rng, video[:1])['params']}, {}

  def loss(
    self,
    params: base.PyTree,
    extra: base.PyTree,
    batch: base.Batch,
    rng: jax.Array,
    *,
    train: bool,
  ) -> base.LossOut:
    """Return the summed cross-entropies and the number of clips.

    Args:
      params: from `init`.
      extra: passed through.
      batch: `video` uint8 [B, T, H, W, 3], or float in [0, 1]; `labels`;
        `row` int32 [B].
      rng: key of the step.
      train: whether labels are smoothed and mixed, and features dropped.
    """
    video = self._video(batch)
    y = self._labels(batch)
    keys = base.example_keys(rng, batch) if train else None
    target = mixing.soft_labels(
      y, self.encoder.num_classes, self.smoothing if train else 0.0
    )
    if train and self.mix is not None:
      kept, share = self.mix(
        jax.random.fold_in(rng, _MIX_ROW), video.shape[2:4]
      )
      kept = kept[None, None, :, :, None]
      video = kept * video + (1.0 - kept) * mixing.partner(video)
      other = mixing.partner(target)
      target = share * target + (1.0 - share) * other
    logits = self._logits(params, video, keys)
    error = optax.softmax_cross_entropy(logits, target)
    metrics = {}
    if not train or self.mix is None:
      metrics['top1'] = (logits.argmax(-1) == y).mean()
    return base.LossOut(
      sums=error.sum()[None],
      counts=jnp.full((1,), len(y), jnp.float32),
      metrics=metrics,
      extra=extra,
    )

  after_update = base.keep_extra

  def check(self, batch: base.Batch) -> None:
    """Refuse labels that the head has no class for.

    Raises:
      ValueError: a label is out of range; names it.
    """
    y = np.asarray(self._labels(batch))
    top = self.encoder.num_classes
    bad = y[(y < 0) | (y >= top)]
    if len(bad):
      raise ValueError(
        f'label {self.label!r} must lie in [0, {top}), found {bad[0]}; change '
        '`objective.encoder.num_classes` or the data'
      )

  def logits(self, params: base.PyTree, batch: base.Batch) -> jax.Array:
    """Return f32 [B, num_classes]."""
    return self._logits(params, self._video(batch), None)

  def embed(self, params: base.PyTree, batch: base.Batch) -> jax.Array:
    """Return the pooled features that the head sees, f32 [B, D]."""
    return self._features(params, self._video(batch), None)

  def _features(self, params, video, keys):
    body = self.encoder.clone(num_classes=0)
    out = body.apply({'params': params['encoder']}, video, keys=keys)
    return jnp.asarray(out, jnp.float32)

  def _logits(self, params, video, keys) -> jax.Array:
    drop = None if keys is None else fold(keys, 0)
    x = self._features(params, video, drop)
    if keys is not None and self.head_drop:
      keep = 1.0 - self.head_drop
      kept = jax.vmap(lambda k: jax.random.bernoulli(k, keep, x.shape[1:]))
      x = x * kept(fold(keys, 1)) / keep
    head = layers.Dense(self.encoder.num_classes, dtype='float32')
    out = head.apply({'params': params['encoder']['head']}, x)
    return jnp.asarray(out)

  def _video(self, batch):
    return pixels.normalise(pixels.pixels(batch), self.mean, self.std)

  def _labels(self, batch):
    if self.label not in batch['labels']:
      raise ValueError(
        f'objective.label: no label {self.label!r}; the data has '
        f'{sorted(batch["labels"])}'
      )
    return batch['labels'][self.label]
