"""Encode videos with a vision transformer over space-time tokens."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from vfm_jax.models import sizes
from vfm_jax.nn import layers
from vfm_jax.nn.transformer import (
  Block,
  Gate,
  Placement,
  QkvBias,
  Remat,
  Stack,
)
from vfm_jax.ops import positions as pos
from vfm_jax.ops import rope
from vfm_jax.ops import tokens as tok

Positions = Literal[
  'flat_sinusoid',
  'sincos_3d',
  'sincos_3d_split',
  'sincos_2d',
  'learned',
  'rope_3d',
  'rope_3d_tiled',
  'none',
]
# How queries and keys turn, for positions that are not added to tokens.
ROTATIONS: dict[str, rope.Layout] = {
  'rope_3d': 'paired',
  'rope_3d_tiled': 'tiled',
}


@dataclasses.dataclass(frozen=True)
class Dims:
  """Hold the dimensions that a size letter stands for."""

  width: int
  depth: int
  heads: int
  mlp_ratio: float = 4.0
  patch: int = 16


# VideoMAE (arXiv:2203.12602) and, for g, VideoMAE V2 (arXiv:2303.16727).
SIZES = {
  'S': Dims(384, 12, 6),
  'B': Dims(768, 12, 12),
  'L': Dims(1024, 24, 16),
  'H': Dims(1280, 32, 16),
  'g': Dims(1408, 40, 16, mlp_ratio=48 / 11, patch=14),
}


class VideoViT(nn.Module):
  """Turn a video [B, T, H, W, 3] into tokens, a vector or class logits.

  Attributes:
    size: 'S', 'B', 'L', 'H' or 'g'; the next five replace what it says.
    width: features of a token.
    depth: number of blocks.
    heads: number of attention heads.
    mlp_ratio: hidden features of the MLPs over `width` (rounded down).
    patch: rows and columns of a token.
    tubelet: frames of a token. A one-frame clip (an image) is repeated to
      fill one tubelet.
    frames: frames of the clips that the positions are built for.
    image_size: rows and columns that the positions are built for, or one
      number for both. For inputs of other sizes they are interpolated.
    positions: position table that is added to the tokens: the sinusoid of
      the flat token index (VideoMAE), 3-D sin-cos (V-JEPA; 'split' gives time
      half of the columns), 2-D sin-cos, 'learned', or 'none'. Or turn queries
      and keys by their place: 'rope_3d', and 'rope_3d_tiled' as V-JEPA 2 is
      released, see `ops.rope.Layout`; other sizes need no interpolation.
    train_positions: False stops the gradient of a learned table, as the
      released VideoMAE code does.
    image_positions: positions of an image: the 'first_slice' (t = 0) of the
      table, or a separate 'sincos_2d' table.
    resample: how positions are interpolated, see `ops.positions.interpolate`.
    qkv_bias: see `nn.transformer.Attention`.
    cosine: cosine attention, see `nn.transformer.Attention`.
    layer_scale: see `nn.transformer.Block`.
    adapter: see `nn.transformer.Block`.
    drop_path: stochastic depth rate of the last block.
    norm: LayerNorm of all 'tokens', of the 'pooled' vector, or 'none'.
    pooling: 'mean' over tokens, 'first' token, or 'none' to return tokens.
    num_classes: classes of a linear head; 0 for none.
    head_scale: factor of the initial weights of the head.
    gate: see `nn.transformer.Gate`.
    init_scheme: 'pretrain' is Xavier uniform, 'finetune' normal with std 0.02,
      'normal' (V-JEPA) the same for the patches too.
    norm_eps: epsilon of the LayerNorms.
    scan: compile one block and loop over it.
    remat: see `nn.transformer.Stack`.
    impl: attention implementation, see `ops.attention`.
    dtype: compute type; parameters are float32.
  """

  size: Literal['S', 'B', 'L', 'H', 'g'] = 'B'
  width: int | None = None
  depth: int | None = None
  heads: int | None = None
  mlp_ratio: float | None = None
  patch: int | None = None
  tubelet: int = 2
  frames: int = 16
  image_size: int | tuple[int, int] = 224
  positions: Positions = 'flat_sinusoid'
  train_positions: bool = True
  image_positions: pos.ImageKind = 'first_slice'
  resample: pos.Resample = 'linear'
  qkv_bias: QkvBias = 'qv'
  cosine: bool = False
  layer_scale: float = 0.0
  adapter: int = 0
  drop_path: float = 0.0
  norm: Literal['tokens', 'pooled', 'none'] = 'tokens'
  pooling: Literal['mean', 'first', 'none'] = 'none'
  num_classes: int = 0
  head_scale: float = 0.001
  gate: Gate = 'none'
  init_scheme: Literal['pretrain', 'finetune', 'normal'] = 'pretrain'
  norm_eps: float = 1e-6
  scan: bool = False
  remat: Remat = 'none'
  impl: str = 'auto'
  dtype: Literal['float32', 'bfloat16', 'float16'] = 'float32'

  @property
  def dims(self) -> Dims:
    """Return the dimensions after all replacements."""
    return sizes.resolve(SIZES, self, 'encoder')

  @property
  def patch_shape(self) -> tok.Grid:
    """Return frames, rows and columns of a token."""
    return (self.tubelet, self.dims.patch, self.dims.patch)

  @property
  def built_grid(self) -> tok.Grid:
    """Return the token grid that the positions are built for."""
    return sizes.built_grid(
      self.image_size, self.frames, self.patch_shape, 'encoder'
    )

  def setup(self):
    """Make the submodules (called by Flax)."""
    dims = self.dims
    if self.num_classes and self.pooling == 'none':
      raise ValueError(
        "a class head needs `encoder.pooling` 'mean' or 'first', found "
        f"'none' with `encoder.num_classes` {self.num_classes}"
      )
    if self.norm == 'pooled' and self.pooling == 'none':
      raise ValueError(
        "`encoder.norm` 'pooled' needs `encoder.pooling` 'mean' or 'first', "
        "found 'none'"
      )
    normal = layers.trunc_normal(0.02, 2.0)
    xavier = self.init_scheme == 'pretrain'
    self.patch_embed = layers.PatchEmbed(
      dims.width,
      self.dtype,
      'normal' if self.init_scheme == 'normal' else 'fan_in',
    )
    if self.positions == 'learned':
      t, h, w = self.built_grid
      self.pos_embed = self.param('pos_embed', normal, (t * h * w, dims.width))
    block = Block(
      heads=dims.heads,
      mlp_width=int(dims.width * dims.mlp_ratio),
      qkv_bias=self.qkv_bias,
      cosine=self.cosine,
      layer_scale=self.layer_scale,
      adapter=self.adapter,
      norm_eps=self.norm_eps,
      impl=self.impl,
      dtype=self.dtype,
      kernel_init=layers.xavier_uniform() if xavier else normal,
      gate=self.gate,
    )
    self.stack = Stack(dims.depth, block, self.drop_path, self.scan, self.remat)
    nn.share_scope(self, self.stack)  # parameters are encoder/blocks_0/...
    # A parameter's path says which norm it is: pretraining's or the head's.
    if self.norm == 'tokens':
      self.final_norm = layers.LayerNorm(self.norm_eps, self.dtype, name='norm')
    elif self.norm == 'pooled':
      self.final_norm = layers.LayerNorm(
        self.norm_eps, self.dtype, name='fc_norm'
      )
    if self.num_classes:
      std = 0.02 * self.head_scale
      self.head = layers.Dense(
        self.num_classes,
        dtype='float32',
        kernel_init=layers.trunc_normal(std, 2.0 * self.head_scale),
      )

  def __call__(
    self,
    video: jax.Array,
    visible_idx: jax.Array | None = None,
    keys: jax.Array | None = None,
  ) -> jax.Array:
    """Encode a video.

    Args:
      video: float [B, T, H, W, 3], normalised as the weights expect.
      visible_idx: int32 [B, n] tokens to encode; None for all. The others
        are dropped before they are embedded.
      keys: one key an example [B] for stochastic depth; None for none of it.

    Returns:
      Tokens [B, n, D], or pooled features [B, D], or logits [B, num_classes].
    """
    x, _ = self._encode(video, visible_idx, keys, ())
    if self.norm == 'tokens':
      x = self.final_norm(x)
    if self.pooling == 'mean':
      x = x.astype(jnp.float32).mean(1).astype(x.dtype)
    elif self.pooling == 'first':
      x = x[:, 0]
    if self.norm == 'pooled':
      x = self.final_norm(x)
    return self.head(x) if self.num_classes else x

  def intermediate(
    self,
    video: jax.Array,
    taps: Sequence[int],
    visible_idx: jax.Array | None = None,
  ) -> list[jax.Array]:
    """Return the outputs [B, n, D] of the blocks `taps`, without a norm."""
    return self._encode(video, visible_idx, None, taps)[1]

  def tapped(
    self,
    video: jax.Array,
    taps: Sequence[int],
    visible_idx: jax.Array | None = None,
    keys: jax.Array | None = None,
  ) -> tuple[jax.Array, list[jax.Array]]:
    """Return what `norm` 'tokens' makes of the last block and of others.

    Args:
      video: see `__call__`.
      taps: block numbers; negative ones count from the end.
      visible_idx: see `__call__`.
      keys: see `__call__`.

    Returns:
      Tokens [B, n, D], and those of `taps` through the same LayerNorm.
    """
    x, tapped = self._encode(video, visible_idx, keys, taps)
    return self.final_norm(x), [self.final_norm(t) for t in tapped]

  def _encode(self, video, visible_idx, keys, taps):
    video = tok.fill_tubelet(video, self.tubelet)
    grid = tok.token_grid(video.shape, self.patch_shape)
    patches = tok.patchify(video, self.patch_shape)
    table = self._positions(grid)
    if visible_idx is not None:
      patches = tok.take(patches, visible_idx)
      table = None if table is None else tok.take(table, visible_idx)
    x = self.patch_embed(patches)
    if table is not None:
      x = x + table.astype(x.dtype)
    return self.stack(x, keys, taps, self._placement(grid, visible_idx))

  def _placement(self, grid, visible_idx):
    if self.positions not in ROTATIONS:
      return None
    head_dim = self.dims.width // self.dims.heads
    layout = ROTATIONS[self.positions]
    return Placement(rope.of_tokens(grid, visible_idx, head_dim, layout))

  def _positions(self, grid):
    if self.positions == 'none' or self.positions in ROTATIONS:
      return None
    built = self.built_grid
    if self.positions == 'learned':
      table = self.pos_embed
      if not self.train_positions:
        table = jax.lax.stop_gradient(table)
    else:
      kind: Any = self.positions  # one of a table
      table = pos.fixed_table(kind, self.dims.width, built)
      table = jnp.asarray(table)
    return pos.fit_table(
      table, built, grid, self.image_positions, self.resample
    )
