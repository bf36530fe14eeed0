"""Learn a teacher's features of what is seen and one's own of what is not.

A reconstruction of how TWLV-I may be pretrained, see `configs/twlv_b.py` for
what its report says and what is ours.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from vfm_jax.models.aligned import AlignedHeads
from vfm_jax.models.encoders import VideoViT
from vfm_jax.models.vjepa import LatentPredictor
from vfm_jax.objectives import base, pixels
from vfm_jax.objectives.distill import Distance, Distill
from vfm_jax.objectives.latent import LatentPrediction
from vfm_jax.objectives.teachers import Teacher
from vfm_jax.ops import guided
from vfm_jax.ops.keys import fold


@dataclasses.dataclass(frozen=True)
class Twlv:
  """Distil a frozen teacher on visible tokens and predict latents of hidden.

  One pass of the encoder over the visible tokens of a mask serves both:

    L = w_A mean |s - t|^2 + w_B mean |y - LN(g)|

  with the heads' features s and the teacher's t of the visible tokens, of
  several layers, and the predictions y of what a slow copy of the encoder says,
  g, of the hidden ones. The two terms are two tasks, for `config.combine`. With
  w_B = 0 the loss is that of `Distill`, with w_A = 0 that of
  `LatentPrediction`, on the same masks, and what a weight of 0 is put on is not
  computed.

  Attributes:
    encoder: encoder of the visible tokens; must return normalised tokens.
    predictor: see `LatentPrediction`.
    teacher: see `Distill`.
    heads: see `Distill`.
    masks: each hides tokens and makes a term of either loss; see `Distill.mask`
      for what they may be.
    image_masks: the same for clips of one slice (images); None for `masks`.
    distill_weight: w_A.
    latent_weight: w_B.
    taps: see `Distill`.
    distance: see `Distill`.
    mask_token: see `LatentPrediction`.
    momentum: see `LatentPrediction`.
    exponent: see `LatentPrediction`.
    rescale: see `LatentPrediction`.
    evaluate: see `LatentPrediction`.
    mean: per-channel mean of the encoder's input, of pixels in [0, 1].
    std: per-channel standard deviation.
  """

  encoder: VideoViT
  predictor: LatentPredictor
  teacher: Teacher
  heads: AlignedHeads = AlignedHeads()
  masks: tuple[Callable[..., Any], ...] = (guided.AttentionGuided(),)
  image_masks: tuple[Callable[..., Any], ...] | None = None
  distill_weight: float = 1.0
  latent_weight: float = 1.0
  taps: tuple[int, ...] = (-6, -5, -4, -3, -2, -1)
  distance: Distance = 'l2'
  mask_token: Literal['own', 'shared'] = 'own'
  momentum: float | Callable[..., Any] = 0.99925
  exponent: float = 1.0
  rescale: bool = False
  evaluate: Literal['copy', 'student'] = 'student'
  mean: pixels.Channels = pixels.IMAGENET_MEAN
  std: pixels.Channels = pixels.IMAGENET_STD

  def __post_init__(self):
    """Refuse weights that leave nothing to learn, and what the parts do."""
    weights = self.distill_weight, self.latent_weight
    if min(weights) < 0 or max(weights) == 0:
      raise ValueError(
        'expected `objective.distill_weight` and `objective.latent_weight` of '
        f'at least 0, one of them positive, found {weights}'
      )
    # Built here, so that their complaints come before anything is allocated.
    _ = self.latent, self.distill
    if self.image_masks is not None:
      self._latent(self.image_masks)

  @functools.cached_property
  def distill(self) -> Distill:
    """Return the first term as an objective of its own, on the first mask."""
    return Distill(
      encoder=self.encoder,
      teacher=self.teacher,
      heads=self.heads,
      mask=self.masks[0],
      image_mask=self.image_masks[0] if self.image_masks else None,
      taps=self.taps,
      distance=self.distance,
      mean=self.mean,
      std=self.std,
    )

  @functools.cached_property
  def latent(self) -> LatentPrediction:
    """Return the second term as an objective of its own."""
    return self._latent(self.masks)

  def init(
    self, rng: jax.Array, batch: base.Batch
  ) -> tuple[base.PyTree, base.PyTree]:
    """Return {'encoder', 'predictor', 'heads'}, and {'target'}, the copy."""
    rngs = jax.random.split(rng)
    params, extra = self.latent.init(rngs[0], batch)
    heads = self.distill.init(rngs[1], batch)[0]['heads']
    return {**params, 'heads': heads}, extra

  def teacher_spec(self) -> dict[str, base.PyTree]:
    """Return shapes and types of what `loss` finds beside the parameters."""
    return self.distill.teacher_spec() if self._asks else {}

  def teachers(self) -> dict[str, base.PyTree]:
    """Return what `loss` finds beside the parameters."""
    return self.distill.teachers() if self._asks else {}

  def loss(
    self,
    params: base.PyTree,
    extra: base.PyTree,
    batch: base.Batch,
    rng: jax.Array,
    *,
    train: bool,
  ) -> base.LossOut:
    """Return the weighted sums of the terms, and the numbers of elements.

    The first is over visible tokens, the second over examples; one of weight 0
    is left out.

    Args:
      params: from `init`, and 'teacher' from `teachers`.
      extra: from `init`; passed through.
      batch: `video` uint8 [B, T, H, W, 3], or float in [0, 1]; `row` int32 [B].
      rng: key of the step.
      train: whether stochastic depth is on.

    Raises:
      ValueError: the weights of the teacher are missing.
    """
    clips = self.distill.pixels_of(batch)
    video = self.latent.video_of(batch)
    grid = self.latent.grid(video)
    keys = base.example_keys(rng, batch)
    seen = self.distill.targets(params, clips) if self._asks else None
    latents = self.latent.targets(extra, video) if self.latent_weight else None
    masks, path = self.masks, 'objective.masks'
    if grid[0] == 1 and self.image_masks is not None:
      masks, path = self.image_masks, 'objective.image_masks'
    distances, errors = [], []
    for i, mask in enumerate(masks):
      split = guided.split(
        mask,
        fold(fold(keys, 0), i),
        grid,
        None if seen is None else seen.attention,
        path=f'{path}.{i}',
      )
      drop_keys = fold(fold(keys, 2), i) if train else None
      encoded, tapped = self._encode(params, clips, video, split, drop_keys)
      if seen is not None:
        distances.append(
          self.distill.error(params, clips, tapped, split.visible_idx, seen)
        )
      if latents is not None:
        pred = self.latent.predict(params, video, encoded, split, i)
        errors.append(self.latent.error(pred, latents, split).mean(-1))
    terms = {}
    if distances:
      total = sum(x.sum() for x in distances)
      count = float(sum(x.size for x in distances))
      terms[f'distill_{self.distance}'] = self.distill_weight, total, count
    if errors:
      total = jnp.sum(sum(errors) / len(masks))
      terms['latent_error'] = self.latent_weight, total, float(len(video))
    return base.LossOut(
      sums=jnp.stack([w * total for w, total, _ in terms.values()]),
      counts=jnp.asarray([n for *_, n in terms.values()], jnp.float32),
      metrics={name: total / n for name, (_, total, n) in terms.items()},
      extra=extra,
    )

  def after_update(
    self,
    extra: base.PyTree,
    params: base.PyTree,
    step: jax.Array,
    metrics: Mapping[str, jax.Array],
  ) -> base.PyTree:
    """Return the copy of the encoder a step later."""
    return self.latent.after_update(extra, params, step, metrics)

  def restart(self, extra: base.PyTree, params: base.PyTree) -> base.PyTree:
    """Return the state of a run that starts from these parameters."""
    return self.latent.restart(extra, params)

  def evaluated(self, params: base.PyTree, extra: base.PyTree) -> base.PyTree:
    """Return the parameters that evaluations use."""
    return self.latent.evaluated(params, extra)

  def embed(self, params: base.PyTree, batch: base.Batch) -> jax.Array:
    """Return the mean of all tokens after the final norm, f32 [B, D]."""
    return self.latent.embed(params, batch)

  def tokens(self, params: base.PyTree, batch: base.Batch) -> jax.Array:
    """Return all tokens after the final norm, f32 [B, n, D]."""
    return self.latent.tokens(params, batch)

  @property
  def _asks(self) -> bool:
    """Whether the teacher is asked."""
    return self.distill_weight > 0

  def _encode(self, params, clips, video, split, drop_keys):
    """Return tokens, and those of `taps` where something learns from them."""
    if self._asks:
      return self.distill.encode(params, clips, split.visible_idx, drop_keys)
    return (
      self.latent.encode(params, video, split.visible_idx, drop_keys),
      (),
    )

  def _latent(self, masks) -> LatentPrediction:
    return LatentPrediction(
      encoder=self.encoder,
      predictor=self.predictor,
      masks=masks,
      mask_token=self.mask_token,
      momentum=self.momentum,
      exponent=self.exponent,
      rescale=self.rescale,
      evaluate=self.evaluate,
      mean=self.mean,
      std=self.std,
    )
