"""Learn by reconstructing the pixels of hidden tokens (VideoMAE, V2)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from vfm_jax.models.encoders import VideoViT
from vfm_jax.models.predictors import PixelDecoder
from vfm_jax.objectives import base, pixels
from vfm_jax.objectives.pixels import IMAGENET_MEAN, IMAGENET_STD
from vfm_jax.ops import masking
from vfm_jax.ops import tokens as tok
from vfm_jax.ops.keys import fold

# What is added to the standard deviation of a target patch.
_EPS = 1e-6


class Reconstruction(flax.struct.PyTreeNode):
  """Hold a forward pass.

  Attributes:
    encoded: [B, n, D] output of the encoder for the visible tokens.
    pred: f32 [B, m, P] predicted features of the decoded tokens.
    target: f32 [B, m, P] what they should be.
    weight: f32 [B, m] 1 for tokens in the loss, 0 for those that the encoder
      has seen.
    target_idx: int32 [B, m] numbers of the decoded tokens, ascending.
  """

  encoded: jax.Array
  pred: jax.Array
  target: jax.Array
  weight: jax.Array
  target_idx: jax.Array


@dataclasses.dataclass(frozen=True)
class Masked:
  """Hide tokens from the encoder and reconstruct their pixels.

  The loss is the squared error, averaged over the features of a token and
  over all tokens of the batch that are decoded and hidden from the encoder:
  the loss of VideoMAE (arXiv:2203.12602), and with `decoder_mask` the dual
  masking of VideoMAE V2 (arXiv:2303.16727).

  Attributes:
    encoder: encoder of the visible tokens; must return normalised tokens.
    decoder: predictor of the hidden ones.
    mask: sampler of what is hidden from the encoder, see `ops.masking`.
    decoder_mask: sampler of what is not decoded. None decodes exactly the
      hidden tokens.
    normalise_target: make each patch and channel of the target zero-mean and
      unit-variance (over the unbiased deviation + 1e-6).
    mean: per-channel mean of the encoder's input, of pixels in [0, 1].
    std: per-channel standard deviation.
  """

  encoder: VideoViT
  decoder: PixelDecoder
  mask: Callable[..., Any] = masking.tube
  decoder_mask: Callable[..., Any] | None = None
  normalise_target: bool = True
  mean: tuple[float, float, float] = IMAGENET_MEAN
  std: tuple[float, float, float] = IMAGENET_STD

  def __post_init__(self):
    encoder = self.encoder
    if encoder.pooling != 'none' or encoder.norm != 'tokens':
      raise ValueError(
        "masked pretraining needs `objective.encoder.pooling` 'none' and "
        f"`objective.encoder.norm` 'tokens', found {encoder.pooling!r} and "
        f'{encoder.norm!r}'
      )

  def init(
    self, rng: jax.Array, batch: base.Batch
  ) -> tuple[base.PyTree, base.PyTree]:
    """Return the parameters {'encoder', 'decoder'} and no other state."""
    video = self._pixels(batch)
    grid = tok.token_grid(
      video.shape, self.encoder.patch_shape, path='objective.encoder'
    )
    rngs = jax.random.split(rng)
    n = grid[0] * grid[1] * grid[2]
    idx = jnp.arange(n, dtype=jnp.int32)[None]
    encoder = self.encoder.init(rngs[0], video[:1])['params']
    decoder = self.decoder.init(
      rngs[1],
      jnp.zeros((1, n, self.encoder.dims.width)),
      idx,
      idx,
      **self._decoder_shape(video, grid),
    )['params']
    return {'encoder': encoder, 'decoder': decoder}, {}

  def loss(
    self,
    params: base.PyTree,
    extra: base.PyTree,
    batch: base.Batch,
    rng: jax.Array,
    *,
    train: bool,
  ) -> base.LossOut:
    """Return the summed token errors and the number of tokens.

    Args:
      params: from `init`.
      extra: passed through.
      batch: `video` uint8 [B, T, H, W, 3], or float in [0, 1]; `row` int32 [B].
      rng: key of the step.
      train: whether stochastic depth is on.
    """
    keys = base.example_keys(rng, batch)
    out = self.reconstruct(
      params,
      self._pixels(batch),
      fold(keys, 0),
      drop_keys=fold(keys, 2) if train else None,
    )
    error = jnp.square(out.pred - out.target).mean(-1)
    total, count = (error * out.weight).sum(), out.weight.sum()
    return base.LossOut(
      sums=total[None],
      counts=count[None],
      metrics={'masked_mse': total / jnp.maximum(count, 1.0)},
      extra=extra,
    )

  after_update = base.keep_extra

  def embed(self, params: base.PyTree, batch: base.Batch) -> jax.Array:
    """Return the mean of all tokens after the final norm, f32 [B, D]."""
    return self.tokens(params, batch).mean(1)

  def tokens(self, params: base.PyTree, batch: base.Batch) -> jax.Array:
    """Return all tokens after the final norm, f32 [B, n, D]."""
    video = self._normalise(self._pixels(batch))
    tokens = _apply(self.encoder, params['encoder'], video)
    return tokens.astype(jnp.float32)

  def visualise(
    self,
    params: base.PyTree,
    extra: base.PyTree,
    batch: base.Batch,
    rng: jax.Array,
  ) -> dict[str, jax.Array]:
    """Return uint8 [B, T, H, W, 3]: original, masked and reconstruction.

    All hidden tokens are decoded, whatever `decoder_mask` is. Predictions
    take the mean and deviation of the true patch; visible patches are copied
    from the input.
    """
    del extra
    video = self._pixels(batch)
    keys = fold(base.example_keys(rng, batch), 0)
    whole = dataclasses.replace(self, decoder_mask=None)
    out = whole.reconstruct(params, video, keys)
    patch = self.encoder.patch_shape
    grid = tok.token_grid(video.shape, patch)
    patches = tok.patchify(video, patch)
    pred = out.pred
    if self.normalise_target:
      _, mean, std = _standardise(
        tok.take(patches, out.target_idx), len(self.mean)
      )
      shape = pred.shape
      pred = pred.reshape(*shape[:2], -1, mean.shape[-1]) * std + mean
      pred = pred.reshape(shape)
    visible_idx, hidden_idx, _ = whole._draw(keys, grid)
    visible = tok.take(patches, visible_idx)

    def assemble(hidden):
      merged = tok.merge(visible, visible_idx, hidden, hidden_idx)
      pixels = tok.unpatchify(merged, grid, patch)
      return jnp.round(255 * jnp.clip(pixels, 0, 1)).astype(jnp.uint8)

    return {
      'original': assemble(tok.take(patches, hidden_idx)),
      'masked': assemble(jnp.full_like(pred, 0.5)),
      'reconstruction': assemble(pred),
    }

  def reconstruct(
    self,
    params: base.PyTree,
    video: jax.Array,
    mask_keys: jax.Array,
    *,
    drop_keys: jax.Array | None = None,
  ) -> Reconstruction:
    """Mask, encode and decode a video.

    Args:
      params: from `init`.
      video: float [B, T, H, W, 3] in [0, 1], with full tubelets.
      mask_keys: one key an example [B].
      drop_keys: one key an example [B] for stochastic depth, or None.
    """
    patch = self.encoder.patch_shape
    grid = tok.token_grid(video.shape, patch, path='objective.encoder')
    visible_idx, target_idx, weight = self._draw(mask_keys, grid)
    encoder_keys, decoder_keys = (
      None if drop_keys is None else fold(drop_keys, i) for i in range(2)
    )
    encoded = _apply(
      self.encoder,
      params['encoder'],
      self._normalise(video),
      visible_idx,
      encoder_keys,
    )
    pred = _apply(
      self.decoder,
      params['decoder'],
      encoded,
      visible_idx,
      target_idx,
      keys=decoder_keys,
      **self._decoder_shape(video, grid),
    )
    target = tok.take(tok.patchify(video, patch), target_idx)
    if self.normalise_target:
      target = _standardise(target, len(self.mean))[0]
    return Reconstruction(encoded, pred, target, weight, target_idx)

  def _draw(self, keys, grid):
    """Return visible and decoded indices, and the weights of the latter."""
    hidden = masking.num_hidden(self.mask, grid, path='objective.mask')
    mask = self.mask(keys, grid)
    visible_idx, hidden_idx = tok.split_by_mask(mask, hidden)
    if self.decoder_mask is None:
      return visible_idx, hidden_idx, jnp.ones(hidden_idx.shape, jnp.float32)
    skipped = masking.num_hidden(
      self.decoder_mask, grid, path='objective.decoder_mask'
    )
    decoder_mask = self.decoder_mask(fold(keys, 1), grid)
    target_idx, _ = tok.split_by_mask(decoder_mask, skipped)
    weight = jnp.take_along_axis(mask, target_idx, axis=1)
    return visible_idx, target_idx, weight.astype(jnp.float32)

  def _decoder_shape(self, video, grid) -> dict[str, Any]:
    t, h, w = self.encoder.patch_shape
    return dict(
      features=t * h * w * video.shape[-1],
      grid=grid,
      built_grid=self.encoder.built_grid,
    )

  def _pixels(self, batch):
    """Return the video as float32 in [0, 1], with full tubelets."""
    video = pixels.pixels(batch, channels=len(self.mean))
    return tok.fill_tubelet(video, self.encoder.tubelet)

  def _normalise(self, video):
    return pixels.normalise(video, self.mean, self.std)


def _apply(module, params, *args, **kwargs) -> Any:
  return module.apply({'params': params}, *args, **kwargs)


def _standardise(patches, channels):
  """Normalise each token and channel of patches [B, n, P].

  Returns:
    The patches [B, n, P]; their means [B, n, 1, C]; and the deviations that
    they were divided by [B, n, 1, C].
  """
  x = patches.reshape(*patches.shape[:2], -1, channels)
  mean = x.mean(2, keepdims=True)
  std = jnp.std(x, 2, keepdims=True, ddof=1) + _EPS
  return ((x - mean) / std).reshape(patches.shape), mean, std
