"""Encode videos with VideoPrism (arXiv:2402.13217): space first, then time.

The encoder is factorised as model 2 of ViViT (arXiv:2103.15691), except that
all tokens of a frame are kept: attention is within a frame in the first stage
and along each patch in the second. Videos are float in [0, 1].
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from vfm_jax.models import sizes
from vfm_jax.nn import layers, prism
from vfm_jax.nn.transformer import Remat
from vfm_jax.ops import positions as pos
from vfm_jax.ops import tokens as tok


@dataclasses.dataclass(frozen=True)
class Dims:
  """Hold the dimensions that a size letter stands for."""

  width: int
  spatial_depth: int
  heads: int
  mlp_width: int
  frames: int
  temporal_depth: int = 4
  patch: int = 18


# Of g there is a configuration, but no weights.
SIZES = {
  'B': Dims(768, 12, 12, 3072, frames=16),
  'L': Dims(1024, 24, 16, 4096, frames=8),
  'g': Dims(1408, 40, 16, 6144, frames=8),
}


class VideoPrism(nn.Module):
  """Turn a video [B, T, H, W, 3] into tokens [B, T * N, D], frame-major.

  Attributes:
    size: 'B', 'L' or 'g'; the next seven replace what it says.
    width: features of a token.
    spatial_depth: number of blocks within frames.
    temporal_depth: number of blocks along time.
    heads: number of attention heads.
    mlp_width: hidden features of the MLPs.
    frames: frames that the temporal positions are built for.
    patch: rows and columns of a token.
    image_size: rows and columns that the spatial positions are built for, or
      one number for both. Positions are interpolated linearly for inputs of
      other sizes, with a filter where they shrink.
    cap: bound on the logits of attention; 0 for none.
    norm_policy: see `nn.prism.PrismBlock`.
    scan: compile one block of each stage and loop over it.
    remat: see `nn.transformer.Stack`.
    dtype: compute type; parameters are float32.
  """

  size: Literal['B', 'L', 'g'] = 'B'
  width: int | None = None
  spatial_depth: int | None = None
  temporal_depth: int | None = None
  heads: int | None = None
  mlp_width: int | None = None
  frames: int | None = None
  patch: int | None = None
  image_size: int | tuple[int, int] = 288
  cap: float = 50.0
  norm_policy: prism.NormPolicy = 'pre'
  scan: bool = False
  remat: Remat = 'none'
  dtype: Literal['float32', 'bfloat16', 'float16'] = 'float32'

  @property
  def dims(self) -> Dims:
    """Return the dimensions after all replacements."""
    return sizes.resolve(SIZES, self, 'encoder')

  @property
  def patch_shape(self) -> tok.Grid:
    """Return frames, rows and columns of a token."""
    return (1, self.dims.patch, self.dims.patch)

  @property
  def built_grid(self) -> tok.Grid:
    """Return the token grid that the positions are built for."""
    return sizes.built_grid(
      self.image_size, self.dims.frames, self.patch_shape, 'encoder'
    )

  def stack(self, depth: int, *, final_norm: bool = True) -> prism.PrismStack:
    """Return further blocks like these, without parameters."""
    dims = self.dims
    block = prism.PrismBlock(
      dims.heads,
      dims.mlp_width,
      self.cap,
      self.norm_policy,
      dtype=self.dtype,
      parent=None,
    )
    return prism.PrismStack(
      depth, block, final_norm, scan=self.scan, remat=self.remat, parent=None
    )

  def setup(self):
    """Make the submodules (called by Flax)."""
    dims = self.dims
    t, h, w = self.built_grid
    init = nn.initializers.lecun_normal()
    self.patch_embed = layers.PatchEmbed(dims.width, self.dtype)
    self.spatial_pos_embed = self.param(
      'spatial_pos_embed', init, (h * w, dims.width)
    )
    self.temporal_pos_embed = self.param(
      'temporal_pos_embed', init, (t, dims.width)
    )
    self.spatial = self.stack(dims.spatial_depth)
    self.temporal = self.stack(dims.temporal_depth)

  def __call__(
    self, video: jax.Array, valid: jax.Array | None = None
  ) -> jax.Array:
    """Return tokens [B, T * N, D].

    Args:
      video: float [B, T, H, W, 3] in [0, 1].
      valid: bool [B, T], False for frames that only fill up the clip; None
        for none of them.
    """
    return self.stages(video, valid)[1]

  def stages(
    self, video: jax.Array, valid: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array]:
    """Return the tokens [B, T * N, D] after the spatial and the last stage."""
    built = self.built_grid
    t, h, w = tok.token_grid(video.shape, self.patch_shape)
    b, n = video.shape[0], h * w
    x = self.patch_embed(tok.patchify(video, self.patch_shape))
    x = x.reshape(b * t, n, -1)
    x = x + _fit(self.spatial_pos_embed, (1, *built[1:]), (1, h, w), x.dtype)
    real = None if valid is None else jnp.repeat(valid.reshape(-1, 1), n, 1)
    x = self.spatial(x, real)
    spatial = x.reshape(b, t * n, -1)
    x = x.reshape(b, t, n, -1).swapaxes(1, 2).reshape(b * n, t, -1)
    x = x + _fit(self.temporal_pos_embed, (built[0], 1, 1), (t, 1, 1), x.dtype)
    real = None if valid is None else jnp.repeat(valid, n, axis=0)
    x = self.temporal(x, real)
    x = x.reshape(b, n, t, -1).swapaxes(1, 2).reshape(b, t * n, -1)
    return spatial, x


class VideoPrismClassifier(nn.Module):
  """Pool the tokens by attention and project them to class logits.

  Attributes:
    encoder: the encoder.
    num_classes: classes of the linear head.
  """

  encoder: VideoPrism
  num_classes: int

  def setup(self):
    """Make the submodules (called by Flax)."""
    dims = self.encoder.dims
    self.pooler = prism.AttentionPooler(
      dims.heads, dims.width, self.encoder.dtype
    )
    self.head = layers.Dense(self.num_classes, dtype='float32')

  def __call__(self, video: jax.Array) -> jax.Array:
    """Return logits f32 [B, num_classes] of a video [B, T, H, W, 3]."""
    return self.head(self.embed(video))

  def embed(self, video: jax.Array) -> jax.Array:
    """Return what the head sees, f32 [B, D]."""
    return self.pooler(self.encoder(video))


def _fit(table, built, grid, dtype):
  table = pos.interpolate(table, built, grid, 'antialiased')
  return table.astype(dtype)
