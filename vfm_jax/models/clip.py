"""Encode the frames of a video with the image tower of CLIP."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from vfm_jax.models import sizes
from vfm_jax.nn import layers
from vfm_jax.nn.transformer import Block, Remat, Stack
from vfm_jax.ops import resize
from vfm_jax.ops import tokens as tok

# Of the pixels in [0, 1] that CLIP was trained on.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class Dims:
  """Hold the dimensions that a size stands for."""

  width: int
  depth: int
  heads: int
  patch: int
  features: int


# CLIP (arXiv:2103.00020, table 20).
SIZES = {
  'B/32': Dims(768, 12, 12, 32, 512),
  'B/16': Dims(768, 12, 12, 16, 512),
  'L/14': Dims(1024, 24, 16, 14, 768),
}


class ClipViT(nn.Module):
  """Turn each frame of a video [B, T, H, W, 3] into tokens, by itself.

  Class token and patches, a LayerNorm before the blocks, pre-norm blocks; a
  LayerNorm and a projection without bias after them (CLIP, arXiv:2103.00020).

  Attributes:
    size: 'B/32', 'B/16' or 'L/14'; the next five replace what it says.
    width: features of a token.
    depth: number of blocks.
    heads: number of attention heads.
    patch: rows and columns of a token.
    features: features after the projection; 0 for no projection.
    mlp_ratio: hidden features of the MLPs over `width`.
    image_size: rows and columns that the positions are built for. For other
      inputs they are interpolated, see `ops.resize.bicubic`; the one of the
      class token stays.
    output: what a frame gives: its 'patches', or the one 'class' token.
    gelu: 'quick' as OpenAI's weights need it; 'erf' for others.
    norm_eps: epsilon of the LayerNorms.
    scan: compile one block and loop over it.
    remat: see `nn.transformer.Stack`.
    impl: attention implementation, see `ops.attention`.
    dtype: compute type; parameters are float32.
  """

  size: Literal['B/32', 'B/16', 'L/14'] = 'B/16'
  width: int | None = None
  depth: int | None = None
  heads: int | None = None
  patch: int | None = None
  features: int | None = None
  mlp_ratio: float = 4.0
  image_size: int = 224
  output: Literal['patches', 'class'] = 'patches'
  gelu: layers.Gelu = 'quick'
  norm_eps: float = 1e-5
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
    return (1, self.dims.patch, self.dims.patch)

  @property
  def built_grid(self) -> tok.Grid:
    """Return the token grid that the positions are built for."""
    return sizes.built_grid(self.image_size, 1, self.patch_shape, 'encoder')

  def setup(self):
    """Make the submodules (called by Flax)."""
    dims = self.dims
    _, height, width = self.built_grid
    # The scales of the released code's initialisation.
    std = dims.width**-0.5
    normal = nn.initializers.normal(std)
    self.patch_embed = layers.Dense(
      dims.width, use_bias=False, dtype=self.dtype, kernel_init=normal
    )
    self.cls_token = self.param('cls_token', normal, (dims.width,))
    self.pos_embed = self.param(
      'pos_embed', normal, (height * width + 1, dims.width)
    )
    block = Block(
      heads=dims.heads,
      mlp_width=int(dims.width * self.mlp_ratio),
      qkv_bias='full',
      norm_eps=self.norm_eps,
      gelu=self.gelu,
      impl=self.impl,
      dtype=self.dtype,
      kernel_init=normal,
    )
    self.stack = Stack(dims.depth, block, 0.0, self.scan, self.remat)
    nn.share_scope(self, self.stack)  # parameters are encoder/blocks_0/...
    self.norm_pre = layers.LayerNorm(self.norm_eps, self.dtype)
    self.norm_post = layers.LayerNorm(self.norm_eps, self.dtype)
    if dims.features:
      self.proj = layers.Dense(
        dims.features, use_bias=False, dtype=self.dtype, kernel_init=normal
      )

  def __call__(
    self,
    video: jax.Array,
    visible_idx: jax.Array | None = None,
    keys: jax.Array | None = None,
  ) -> jax.Array:
    """Encode each frame of a video.

    Args:
      video: float [B, T, H, W, 3], normalised by `MEAN` and `STD`.
      visible_idx: int32 [B, n] tokens to return, of all T*H'*W' (or T); None
        for all. All are computed.
      keys: unused; there is no stochastic depth.

    Returns:
      Tokens [B, n, E] after the last LayerNorm and the projection.
    """
    del keys
    x, _ = self._encode(video, ())
    x = self._finish(x, video.shape[:2])
    return x if visible_idx is None else tok.take(x, visible_idx)

  def intermediate(
    self, video: jax.Array, taps: Sequence[int]
  ) -> list[jax.Array]:
    """Return the tokens [B, n, E] of the blocks `taps`.

    Each is what `__call__` would return if that block were the last.

    Args:
      video: see `__call__`.
      taps: block numbers; negative ones count from the end.
    """
    tapped = self._encode(video, taps)[1]
    return [self._finish(x, video.shape[:2]) for x in tapped]

  def _encode(self, video, taps):
    b, t = video.shape[:2]
    grid = tok.token_grid(video.shape, self.patch_shape)
    x = self.patch_embed(tok.patchify(video, self.patch_shape))
    x = x.reshape(b * t, -1, x.shape[-1])
    first = jnp.broadcast_to(
      self.cls_token.astype(x.dtype), (b * t, 1, x.shape[-1])
    )
    x = jnp.concatenate([first, x], 1)
    x = self.norm_pre(x + self._positions(grid).astype(x.dtype))
    return self.stack(x, None, taps)

  def _finish(self, x, lead):
    x = x[:, :1] if self.output == 'class' else x[:, 1:]
    x = self.norm_post(x)
    if self.dims.features:
      x = self.proj(x)
    return x.reshape(lead[0], -1, x.shape[-1])

  def _positions(self, grid):
    _, *built = self.built_grid
    table = self.pos_embed
    patches = table[1:].reshape(1, *built, -1)
    patches = resize.bicubic(patches, *grid[1:])
    return jnp.concatenate([table[:1], patches.reshape(-1, table.shape[-1])])
