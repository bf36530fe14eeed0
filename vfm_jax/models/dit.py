"""Denoise images and videos with a diffusion transformer (DiT).

Peebles & Xie 2022 (arXiv:2212.09748): patches, fixed positions, blocks with
adaptive LayerNorms, and a linear layer back to patches.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vfm_jax.models import sizes
from vfm_jax.models.labels import Labelled
from vfm_jax.nn import adaln, layers
from vfm_jax.nn.mixer import Mixing
from vfm_jax.nn.transformer import Remat, Stack
from vfm_jax.ops import positions as pos
from vfm_jax.ops import tokens as tok


@dataclasses.dataclass(frozen=True)
class Dims:
  """Hold the dimensions that a size letter stands for."""

  width: int
  depth: int
  heads: int


SIZES = {
  'S': Dims(384, 12, 6),
  'B': Dims(768, 12, 12),
  'L': Dims(1024, 24, 16),
  'XL': Dims(1152, 28, 16),
}


class DiT(Labelled, nn.Module):
  """Map a noisy image [B, H, W, C] or video [B, T, H, W, C] to a prediction.

  The output is zero at first. A video is cut into tubelets; its positions are
  those of an image plus a 1-D sinusoid of the slice in time.

  Attributes:
    size: 'S', 'B', 'L' or 'XL'; the next three replace what it says.
    width: features of a token.
    depth: number of blocks.
    heads: number of attention heads.
    mlp_ratio: hidden features of the MLPs over `width` (rounded down).
    patch: rows and columns of a token.
    tubelet: frames of a token.
    input_size: rows and columns that the positions are built for, or one
      number for both. For inputs of other sizes they are interpolated.
    frames: frames that the positions are built for; 1 for images.
    channels: C of the input.
    learn_sigma: predict twice as many channels: noise, then variance values.
    num_classes: number of labels; 0 for no labels.
    label_dropout: rate at which a caller drops labels in training. Above 0
      the table has one more row, the null label `num_classes`.
    attention: 'joint' over space and time, or 'factorised' into space, then
      time, inside each block; see `nn.adaln.AdaLNBlock`.
    hooks: what is changed at the entry of each block, see `nn.adaln.Hooks`.
    mixing: mix convolution and attention over space in place of attention, see
      `nn.mixer`; blocks of different shares differ in shape and do not scan.
    norm_eps: epsilon of the LayerNorms.
    scan: compile one block and loop over it.
    remat: see `nn.transformer.Stack`.
    impl: attention implementation, see `ops.attention`.
    dtype: compute type of tokens; parameters and conditioning are float32.
  """

  size: Literal['S', 'B', 'L', 'XL'] = 'B'
  width: int | None = None
  depth: int | None = None
  heads: int | None = None
  mlp_ratio: float = 4.0
  patch: int = 2
  tubelet: int = 1
  input_size: int | tuple[int, int] = 32
  frames: int = 1
  channels: int = 4
  learn_sigma: bool = True
  num_classes: int = 1000
  label_dropout: float = 0.1
  attention: adaln.Layout = 'joint'
  hooks: adaln.Hooks = adaln.Hooks()
  mixing: Mixing | None = None
  norm_eps: float = 1e-6
  scan: bool = False
  remat: Remat = 'none'
  impl: str = 'auto'
  dtype: Literal['float32', 'bfloat16', 'float16'] = 'float32'

  @property
  def dims(self) -> Dims:
    """Return the dimensions after all replacements."""
    return sizes.resolve(SIZES, self, 'denoiser')

  @property
  def patch_shape(self) -> tok.Grid:
    """Return frames, rows and columns of a token."""
    return (self.tubelet, self.patch, self.patch)

  @property
  def built_grid(self) -> tok.Grid:
    """Return the token grid that the positions are built for."""
    return sizes.built_grid(
      self.input_size, self.frames, self.patch_shape, 'denoiser'
    )

  def setup(self):
    """Make the submodules (called by Flax)."""
    dims = self.dims
    if self.hooks.prefix and self.attention == 'factorised':
      raise ValueError(
        "`denoiser.hooks.prefix` needs `denoiser.attention` 'joint', found "
        f"'factorised' with a prefix of {self.hooks.prefix}"
      )
    self.patch_embed = layers.PatchEmbed(dims.width, self.dtype, 'xavier')
    self.t_embed = adaln.TimeEmbed(dims.width)
    if self.num_classes:
      self.y_embed = adaln.LabelEmbed(self.label_rows, dims.width)
    if self.hooks.prepare is not None:
      self.prepare = adaln.own(self, self.hooks.prepare, 'prepare_hook')
    block = adaln.AdaLNBlock(
      heads=dims.heads,
      mlp_width=int(dims.width * self.mlp_ratio),
      attention=self.attention,
      hooks=self.hooks,
      norm_eps=self.norm_eps,
      impl=self.impl,
      dtype=self.dtype,
    )
    blocks = block if self.mixing is None else self._mixing(block)
    self.stack = Stack(dims.depth, blocks, scan=self.scan, remat=self.remat)
    nn.share_scope(self, self.stack)  # parameters are blocks_0/...
    pixels = self.tubelet * self.patch**2
    self.final = adaln.FinalLayer(
      pixels * self.out_channels, self.norm_eps, self.dtype
    )

  def __call__(
    self,
    x: jax.Array,
    t: jax.Array,
    y: jax.Array | None = None,
    *,
    drop: jax.Array | None = None,
    tau: jax.Array | None = None,
    keys: jax.Array | None = None,
  ) -> jax.Array:
    """Predict from a noisy input.

    Args:
      x: float [B, H, W, C], or [B, T, H, W, C].
      t: [B] times, embedded as they are; or [B, T'], one for each of the
        T / tubelet slices of a video.
      y: int32 [B] labels; None for the null label, or for no labels.
      drop: bool [B], True replaces the label by the null label.
      tau: int32 [B] noise level for the hooks, 0 (clean) to 999.
      keys: one random key an example [B] for the hooks; None for none.

    Returns:
      float32, the shape of x with `out_channels` channels: the prediction
      and, with `learn_sigma`, the variance values after it.

    Raises:
      ValueError: x or t is of another shape, or a null label is asked for
        that the model does not have.
    """
    if x.ndim not in (4, 5) or x.shape[-1] != self.channels:
      raise ValueError(
        f'expected an input [B, H, W, {self.channels}] or [B, T, H, W, '
        f'{self.channels}], found shape {x.shape}; change '
        '`denoiser.channels` or `data`'
      )
    video = x if x.ndim == 5 else x[:, None]
    grid = tok.token_grid(video.shape, self.patch_shape, path='denoiser')
    context = self._condition(t, y, drop, tau, keys, grid)
    h = self.patch_embed(tok.patchify(video, self.patch_shape))
    h = h + self._positions(grid).astype(h.dtype)
    if self.hooks.prefix:
      h = jnp.pad(h, ((0, 0), (self.hooks.prefix, 0), (0, 0)))
    h, _ = self.stack(h, cond=context)
    h = self.final(h, context.c)[:, self.hooks.prefix :]
    out = tok.unpatchify(h.astype(jnp.float32), grid, self.patch_shape)
    return out if x.ndim == 5 else out[:, 0]

  def _mixing(self, block):
    """Return the blocks, each with the mixer of its depth."""
    assert self.mixing is not None
    if self.scan:
      raise ValueError(
        '`denoiser.mixing` gives blocks of different shapes, which need '
        '`denoiser.scan` False, found True'
      )
    if self.hooks.prefix:
      raise ValueError(
        '`denoiser.mixing` needs a map of tokens and nothing else, found a '
        f'`denoiser.hooks.prefix` of {self.hooks.prefix}'
      )
    if self.built_grid[0] > 1 and self.attention == 'joint':
      raise ValueError(
        '`denoiser.mixing` mixes over space: for videos it needs '
        "`denoiser.attention` 'factorised', found 'joint'"
      )
    mixers = self.mixing.by_depth(self.dims.depth)
    return tuple(block.clone(mixer=mixer) for mixer in mixers)

  def _condition(self, t, y, drop, tau, keys, grid):
    slices = t.shape[1:] or (1,)
    if slices not in ((1,), grid[:1]) or (slices != (1,) and self.hooks.prefix):
      raise ValueError(
        f'expected times [B] or [B, {grid[0]}], one for each {self.tubelet} '
        f'frames and without `denoiser.hooks.prefix`, found shape {t.shape}'
      )
    c = t_embed = self.t_embed(t.reshape(-1, *slices))
    if (rows := self.choose_labels(y, drop, len(t))) is not None:
      c = c + self.y_embed(rows)[:, None]
    context = adaln.Context(c=c, t_embed=t_embed, tau=tau, keys=keys, grid=grid)
    if self.hooks.prepare is None:
      return context
    return context.replace(shared=self.prepare(context, self.t_embed))

  def _positions(self, grid):
    t, h, w = built = self.built_grid
    if t == 1 and grid[0] > 1:
      raise ValueError(
        f'expected one slice of {self.tubelet} frames, found {grid[0]}; '
        'change `denoiser.frames`, which the positions are built for'
      )
    width = self.dims.width
    # The column is coded in the first half.
    table = np.tile(pos.sincos_2d((h, w), width, first='w'), (t, 1))
    if t > 1:
      table += np.repeat(pos.sincos_1d(np.arange(t), width), h * w, axis=0)
    return pos.fit_table(jnp.asarray(table, jnp.float32), built, grid)
