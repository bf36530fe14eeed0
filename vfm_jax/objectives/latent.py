"""Learn by predicting the features of hidden tokens (V-JEPA, V-JEPA 2)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp

from vfm_jax import convert_vjepa
from vfm_jax.models.encoders import VideoViT
from vfm_jax.models.vjepa import LatentPredictor
from vfm_jax.nn import layers, transformer
from vfm_jax.objectives import base, pixels
from vfm_jax.ops import blocks
from vfm_jax.ops import tokens as tok
from vfm_jax.ops.keys import fold

# The epsilon of the targets' LayerNorm, which learns nothing.
_TARGET_EPS = 1e-5


class Forward(flax.struct.PyTreeNode):
  """Hold a forward pass.

  Attributes:
    splits: what each mask shows and hides.
    encoded: [B, n, D] of the visible tokens, for each mask.
    preds: f32 [B, m, D] of the hidden ones, for each mask.
    targets: f32 [B, N, D] of all tokens.
  """

  splits: tuple[blocks.Split, ...]
  encoded: tuple[jax.Array, ...]
  preds: tuple[jax.Array, ...]
  targets: jax.Array


@dataclasses.dataclass(frozen=True)
class LatentPrediction:
  """Predict a slow copy's features of hidden tokens from the visible ones.

  The copy, an average of the encoder over the steps, sees the whole clip; its
  tokens are normalised over their features. Every mask of `masks` makes one
  prediction. The loss of an example is |z - h|^p / p, averaged over features,
  over the tokens of a mask, then over the masks (V-JEPA, arXiv:2404.08471;
  V-JEPA 2, arXiv:2506.09985).

  Attributes:
    encoder: encoder of the visible tokens; must return normalised tokens.
    predictor: predicts the hidden ones.
    masks: what is seen and what predicted, see `ops.blocks`.
    mask_token: 'own' gives each mask a mask token of the predictor's
      (V-JEPA), 'shared' takes the first for all (V-JEPA 2 for clips of one
      length).
    momentum: share of its weights that the copy keeps in a step; or a schedule
      (finished steps) -> share.
    exponent: p of the loss.
    hinge: weight of the mean over features of relu(1 - s), with the standard
      deviation s of the predictions over tokens, averaged over masks. V-JEPA
      reports it with a weight of 0.
    rescale: divide the initial last kernels of block l by sqrt(2 l), as V-JEPA
      2 does; the released V-JEPA loses it by a second initialisation.
    evaluate: whose encoder evaluations use.
    mean: per-channel mean of the encoder's input, of pixels in [0, 1].
    std: per-channel standard deviation.
  """

  encoder: VideoViT
  predictor: LatentPredictor
  masks: tuple[Callable[..., Any], ...] = (blocks.SHORT, blocks.LONG)
  mask_token: Literal['own', 'shared'] = 'own'
  momentum: float | Callable[..., Any] = 0.99925
  exponent: float = 1.0
  hinge: float = 0.0
  rescale: bool = True
  evaluate: Literal['copy', 'student'] = 'copy'
  mean: pixels.Channels = pixels.IMAGENET_MEAN
  std: pixels.Channels = pixels.IMAGENET_STD

  def __post_init__(self):
    """Refuse an encoder that pools, and masks without a mask token."""
    encoder = self.encoder
    if encoder.pooling != 'none' or encoder.norm != 'tokens':
      raise ValueError(
        "latent prediction needs `objective.encoder.pooling` 'none' and "
        f"`objective.encoder.norm` 'tokens', found {encoder.pooling!r} and "
        f'{encoder.norm!r}'
      )
    if not self.masks:
      raise ValueError('expected at least one of `objective.masks`, found none')
    have = self.predictor.mask_tokens
    if self.mask_token == 'own' and len(self.masks) > have:
      raise ValueError(
        f'{len(self.masks)} masks need as many '
        f'`objective.predictor.mask_tokens`, found {have}; or set '
        "`objective.mask_token` to 'shared'"
      )
    if not callable(self.momentum) and not 0 <= self.momentum <= 1:
      raise ValueError(
        'expected `objective.momentum` from 0 to 1, or a schedule, found '
        f'{self.momentum}'
      )

  def init(
    self, rng: jax.Array, batch: base.Batch
  ) -> tuple[base.PyTree, base.PyTree]:
    """Return {'encoder', 'predictor'}, and {'target'}, the encoder's copy."""
    video = self.video_of(batch)[:1]
    grid = self.grid(video)
    rngs = jax.random.split(rng)
    idx = jnp.zeros((1, 1), jnp.int32)
    params = {
      'encoder': self.encoder.init(rngs[0], video)['params'],
      'predictor': self.predictor.init(
        rngs[1],
        jnp.zeros((1, 1, self.encoder.dims.width)),
        idx,
        idx,
        grid=grid,
        built_grid=self.encoder.built_grid,
      )['params'],
    }
    if self.rescale:
      params = transformer.rescale_residual(params)
    return params, self.restart({}, params)

  def loss(
    self,
    params: base.PyTree,
    extra: base.PyTree,
    batch: base.Batch,
    rng: jax.Array,
    *,
    train: bool,
  ) -> base.LossOut:
    """Return the summed losses of the examples and their number.

    Args:
      params: from `init`.
      extra: from `init`; passed through.
      batch: `video` uint8 [B, T, H, W, 3], or float in [0, 1]; `row` int32 [B].
      rng: key of the step.
      train: whether stochastic depth is on.
    """
    video = self.video_of(batch)
    keys = base.example_keys(rng, batch)
    drop_keys = fold(keys, 2) if train else None
    made = self.forward(params, extra, video, fold(keys, 0), drop_keys)
    return self.score(made, extra)

  def score(self, made: Forward, extra: base.PyTree) -> base.LossOut:
    """Return the loss of a forward pass."""
    errors = [
      self.error(pred, made.targets, split).mean(-1)
      for pred, split in zip(made.preds, made.splits, strict=True)
    ]
    spreads = [jnp.sqrt(z.var(1, ddof=1) + 1e-4) for z in made.preds]
    error = jnp.stack(errors).mean(0)
    spread = sum(spreads) / len(self.masks)
    hinge = jax.nn.relu(1.0 - spread).mean(-1)
    total = error + self.hinge * hinge if self.hinge else error
    return base.LossOut(
      sums=total.sum()[None],
      counts=jnp.full((1,), len(error), jnp.float32),
      metrics={'latent_error': error.mean(), 'latent_hinge': hinge.mean()},
      extra=extra,
    )

  def forward(
    self,
    params: base.PyTree,
    extra: base.PyTree,
    video: jax.Array,
    mask_keys: jax.Array,
    drop_keys: jax.Array | None = None,
  ) -> Forward:
    """Encode what each mask leaves and predict what it hides.

    Args:
      params: from `init`.
      extra: from `init`.
      video: from `video_of`.
      mask_keys: one key an example [B].
      drop_keys: one key an example [B] for stochastic depth, or None.
    """
    targets, grid = self.targets(extra, video), self.grid(video)
    splits, encoded, preds = [], [], []
    for i, mask in enumerate(self.masks):
      split = mask(fold(mask_keys, i), grid)
      drop = None if drop_keys is None else fold(drop_keys, i)
      x = self.encode(params, video, split.visible_idx, drop)
      splits.append(split)
      encoded.append(x)
      preds.append(self.predict(params, video, x, split, i))
    return Forward(tuple(splits), tuple(encoded), tuple(preds), targets)

  def after_update(
    self,
    extra: base.PyTree,
    params: base.PyTree,
    step: jax.Array,
    metrics: Any,
  ) -> base.PyTree:
    """Return the copy t <- m t + (1 - m) s of the encoder's weights s."""
    del metrics
    m = self.momentum(step) if callable(self.momentum) else self.momentum
    return {'target': average(extra['target'], params['encoder'], m)}

  def restart(self, extra: base.PyTree, params: base.PyTree) -> base.PyTree:
    """Return the state of a run that starts from these parameters."""
    del extra
    return {'target': jax.tree.map(jnp.copy, params['encoder'])}

  def evaluated(self, params: base.PyTree, extra: base.PyTree) -> base.PyTree:
    """Return the parameters that evaluations use."""
    if self.evaluate == 'student':
      return params
    return {**params, 'encoder': extra['target']}

  def converted(
    self, state: Mapping[str, Any], template: base.PyTree
  ) -> base.PyTree:
    """Return the parameters of a file of V-JEPA or V-JEPA 2, and 'target'.

    Args:
      state: its tensors by name, see `convert_vjepa.read`.
      template: parameters and `extra`, or their shapes, in one dict.

    Raises:
      ConversionError: a tensor is missing, left over or of another shape.
    """
    return convert_vjepa.from_vjepa(
      state, template, encoder=self.encoder, predictor=self.predictor
    )

  def embed(self, params: base.PyTree, batch: base.Batch) -> jax.Array:
    """Return the mean of all tokens after the final norm, f32 [B, D]."""
    return self.tokens(params, batch).mean(1)

  def tokens(self, params: base.PyTree, batch: base.Batch) -> jax.Array:
    """Return all tokens after the final norm, f32 [B, n, D]."""
    return self.encode(params, self.video_of(batch)).astype(jnp.float32)

  def video_of(self, batch: base.Batch) -> jax.Array:
    """Return clips as the encoder takes them, f32 [B, T, H, W, 3]."""
    video = pixels.pixels(batch, channels=len(self.mean))
    video = pixels.normalise(video, self.mean, self.std)
    return tok.fill_tubelet(video, self.encoder.tubelet)

  def grid(self, video: jax.Array) -> tok.Grid:
    """Return the token grid (T', H', W') of clips from `video_of`."""
    return tok.token_grid(
      video.shape, self.encoder.patch_shape, path='objective.encoder'
    )

  def encode(
    self,
    params: base.PyTree,
    video: jax.Array,
    visible_idx: jax.Array | None = None,
    drop_keys: jax.Array | None = None,
  ) -> jax.Array:
    """Return tokens [B, n, D] after the final norm.

    Args:
      params: from `init`; 'encoder' is read.
      video: from `video_of`.
      visible_idx: int32 [B, n] tokens to encode; None for all.
      drop_keys: one key an example [B] for stochastic depth, or None.
    """
    out: Any = self.encoder.apply(
      {'params': params['encoder']}, video, visible_idx, drop_keys
    )
    return out

  def targets(self, extra: base.PyTree, video: jax.Array) -> jax.Array:
    """Return what is to be predicted of all tokens, f32 [B, N, D].

    Args:
      extra: from `init`; nothing learns it by a gradient.
      video: from `video_of`, with nothing hidden.
    """
    encoded = self.encode({'encoder': extra['target']}, video)
    norm = layers.LayerNorm(_TARGET_EPS, affine=False)
    targets: Any = norm.apply({}, encoded)
    return jax.lax.stop_gradient(targets)

  def predict(
    self,
    params: base.PyTree,
    video: jax.Array,
    encoded: jax.Array,
    split: blocks.Split,
    group: int = 0,
    *,
    whole: bool = False,
  ) -> jax.Array:
    """Return predictions of the targets of a split, f32 [B, m, D].

    Args:
      params: from `init`; 'predictor' is read.
      video: from `video_of`, for its shape only.
      encoded: [B, n, D] of the visible tokens of the split.
      split: what is seen and what predicted.
      group: number of the mask.
      whole: see `LatentPredictor`.
    """
    out: Any = self.predictor.apply(
      {'params': params['predictor']},
      encoded,
      *split,
      grid=self.grid(video),
      built_grid=self.encoder.built_grid,
      mask_token=group if self.mask_token == 'own' else 0,
      whole=whole,
    )
    return out

  def error(
    self, pred: jax.Array, targets: jax.Array, split: blocks.Split
  ) -> jax.Array:
    """Return the error of each predicted token, f32 [B, m].

    Args:
      pred: f32 [B, m, D] from `predict`.
      targets: f32 [B, N, D] from `targets`.
      split: what was predicted.
    """
    size = jnp.abs(pred - tok.take(targets, split.target_idx))
    if self.exponent != 1.0:
      size = size**self.exponent / self.exponent
    return size.mean(-1)


def average(old: base.PyTree, new: base.PyTree, momentum: Any) -> base.PyTree:
  """Return momentum * old + (1 - momentum) * new, leaf by leaf."""
  rest = 1.0 - momentum
  return jax.tree.map(lambda t, s: momentum * t + rest * s, old, new)
