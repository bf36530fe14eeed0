"""Predict what is hidden from what is visible."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from vfm_jax.nn import layers
from vfm_jax.nn.transformer import Block, QkvBias, Remat, Stack
from vfm_jax.ops import positions as pos
from vfm_jax.ops import tokens as tok


class PixelDecoder(nn.Module):
  """Reconstruct the pixels of tokens with a narrow transformer.

  The input is [visible ; mask tokens], each with its position, not put back
  into raster order; the rows of the mask tokens are the output (VideoMAE,
  arXiv:2203.12602).

  Attributes:
    width: features of a token.
    depth: number of blocks.
    heads: number of attention heads.
    mlp_ratio: hidden features of the MLPs over `width` (rounded down).
    positions: fixed position table, see `VideoViT`.
    image_positions: see `VideoViT`.
    qkv_bias: see `nn.transformer.Attention`.
    cosine: cosine attention, see `nn.transformer.Attention`.
    layer_scale: see `nn.transformer.Block`.
    drop_path: stochastic depth rate of the last block.
    norm_eps: epsilon of the LayerNorms.
    scan: compile one block and loop over it.
    remat: see `nn.transformer.Stack`.
    impl: attention implementation, see `ops.attention`.
    dtype: compute type; parameters are float32.
  """

  width: int = 384
  depth: int = 4
  heads: int = 6
  mlp_ratio: float = 4.0
  positions: pos.Kind = 'flat_sinusoid'
  image_positions: pos.ImageKind = 'first_slice'
  qkv_bias: QkvBias = 'qv'
  cosine: bool = False
  layer_scale: float = 0.0
  drop_path: float = 0.0
  norm_eps: float = 1e-6
  scan: bool = False
  remat: Remat = 'none'
  impl: str = 'auto'
  dtype: Literal['float32', 'bfloat16', 'float16'] = 'float32'

  def setup(self):
    """Make the submodules (called by Flax)."""
    block = Block(
      heads=self.heads,
      mlp_width=int(self.width * self.mlp_ratio),
      qkv_bias=self.qkv_bias,
      cosine=self.cosine,
      layer_scale=self.layer_scale,
      norm_eps=self.norm_eps,
      impl=self.impl,
      dtype=self.dtype,
    )
    self.stack = Stack(self.depth, block, self.drop_path, self.scan, self.remat)
    nn.share_scope(self, self.stack)  # parameters are decoder/blocks_0/...

  @nn.compact
  def __call__(
    self,
    visible: jax.Array,
    visible_idx: jax.Array,
    target_idx: jax.Array,
    *,
    features: int,
    grid: tok.Grid,
    built_grid: tok.Grid,
    keys: jax.Array | None = None,
  ) -> jax.Array:
    """Predict the tokens `target_idx`.

    Args:
      visible: [B, n, D] output of the encoder.
      visible_idx: int32 [B, n] their token numbers.
      target_idx: int32 [B, m] token numbers to predict.
      features: pixels of a token times channels.
      grid: (T', H', W') of the input.
      built_grid: the grid that the positions are built for.
      keys: one key an example [B] for stochastic depth; None for none of it.

    Returns:
      float32 [B, m, features].
    """
    # The two ends keep the defaults of the released code: U(+-1/sqrt(D)) for
    # the projection, Xavier for the head.
    x = layers.Dense(
      self.width,
      use_bias=False,
      dtype=self.dtype,
      kernel_init=layers.uniform_fan_in(visible.shape[-1]),
      name='embed',
    )(visible)
    # Cut off at one standard deviation.
    mask_token = self.param(
      'mask_token', layers.trunc_normal(0.02, 0.02), (self.width,)
    )
    table = pos.fixed_table(self.positions, self.width, built_grid)
    table = pos.fit_table(
      jnp.asarray(table), built_grid, grid, self.image_positions
    ).astype(x.dtype)
    x = jnp.concatenate(
      [
        x + tok.take(table, visible_idx),
        mask_token.astype(x.dtype) + tok.take(table, target_idx),
      ],
      axis=1,
    )
    self.sow('intermediates', 'decoder_in', x)
    x, _ = self.stack(x, keys)
    x = x[:, visible.shape[1] :]
    x = layers.LayerNorm(self.norm_eps, self.dtype, name='norm')(x)
    x = layers.Dense(
      features,
      dtype=self.dtype,
      kernel_init=layers.xavier_uniform(),
      name='head',
    )(x)
    return x.astype(jnp.float32)
