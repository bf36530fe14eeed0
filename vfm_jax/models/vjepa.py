"""Predict the features of hidden tokens from those of visible ones."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vfm_jax.models.encoders import ROTATIONS
from vfm_jax.nn import layers
from vfm_jax.nn.transformer import Block, Gate, Placement, Remat, Stack
from vfm_jax.ops import positions as pos
from vfm_jax.ops import rope
from vfm_jax.ops import tokens as tok

Positions = Literal['sincos_3d', 'sincos_3d_split', 'rope_3d', 'rope_3d_tiled']


class LatentPredictor(nn.Module):
  """Predict features with a narrow transformer (V-JEPA, V-JEPA 2).

  The input is [visible ; mask tokens], each with its position, not put back
  into raster order; the rows of the mask tokens are the output.

  Attributes:
    width: features of a token.
    depth: number of blocks.
    heads: number of attention heads; V-JEPA takes those of the encoder.
    mlp_ratio: hidden features of the MLPs over `width` (rounded down).
    mask_tokens: number of learned mask tokens, zero at first.
    positions: see `VideoViT`.
    gate: see `nn.transformer.Gate`.
    norm_eps: epsilon of the LayerNorms.
    scan: compile one block and loop over it.
    remat: see `nn.transformer.Stack`.
    impl: attention implementation, see `ops.attention`.
    dtype: compute type; parameters are float32.
  """

  width: int = 384
  depth: int = 12
  heads: int = 12
  mlp_ratio: float = 4.0
  mask_tokens: int = 2
  positions: Positions = 'sincos_3d'
  gate: Gate = 'none'
  norm_eps: float = 1e-6
  scan: bool = False
  remat: Remat = 'none'
  impl: str = 'auto'
  dtype: Literal['float32', 'bfloat16', 'float16'] = 'float32'

  def setup(self):
    """Make the submodules (called by Flax)."""
    block = _block(self)
    self.stack = Stack(self.depth, block, 0.0, self.scan, self.remat)
    nn.share_scope(self, self.stack)  # parameters are predictor/blocks_0/...

  @nn.compact
  def __call__(
    self,
    visible: jax.Array,
    visible_idx: jax.Array,
    target_idx: jax.Array,
    *,
    grid: tok.Grid,
    built_grid: tok.Grid,
    mask_token: int = 0,
    whole: bool = False,
  ) -> jax.Array:
    """Predict the tokens `target_idx`.

    Args:
      visible: [B, n, D] output of the encoder.
      visible_idx: int32 [B, n] their token numbers.
      target_idx: int32 [B, m] token numbers to predict.
      grid: (T', H', W') of the input.
      built_grid: the grid that a position table is built for.
      mask_token: number of the mask token to use.
      whole: also return what comes of the visible tokens, which nothing
        trains, first: [B, n + m, D].

    Returns:
      float32 [B, m, D].
    """
    features = visible.shape[-1]
    x = layers.Dense(
      self.width, dtype=self.dtype, kernel_init=_NORMAL, name='embed'
    )(visible)
    tokens = self.param(
      'mask_tokens', nn.initializers.zeros, (self.mask_tokens, self.width)
    )
    if not 0 <= mask_token < self.mask_tokens:
      raise ValueError(
        f'expected a mask token below {self.mask_tokens}, found {mask_token}; '
        'change `objective.predictor.mask_tokens`'
      )
    shape = (*target_idx.shape, self.width)
    masked = jnp.broadcast_to(tokens[mask_token].astype(x.dtype), shape)
    x = jnp.concatenate([x, masked], axis=1)
    idx = jnp.concatenate([visible_idx, target_idx], axis=1)
    placement = None
    if self.positions in ROTATIONS:
      head_dim = self.width // self.heads
      layout = ROTATIONS[self.positions]
      placement = Placement(rope.of_tokens(grid, idx, head_dim, layout))
    else:
      kind: Any = self.positions  # one of a table
      table = pos.fixed_table(kind, self.width, built_grid)
      table = pos.fit_table(jnp.asarray(table), built_grid, grid)
      x = x + tok.take(table.astype(x.dtype), idx)
    x, _ = self.stack(x, cond=placement)
    if not whole:
      x = x[:, visible.shape[1] :]
    x = layers.LayerNorm(self.norm_eps, self.dtype, name='norm')(x)
    x = layers.Dense(
      features, dtype=self.dtype, kernel_init=_NORMAL, name='proj'
    )(x)
    return x.astype(jnp.float32)


class ActionPredictor(nn.Module):
  """Predict the features of the next frames from actions (V-JEPA 2-AC).

  A frame is a sequence [action, state, (extrinsics), its tokens]; a token sees
  those of its own frame and of earlier ones. The first two or three turn with
  time alone. V-JEPA 2, arXiv:2506.09985, section 3.

  Attributes:
    width: features of a token.
    depth: number of blocks.
    heads: number of attention heads.
    mlp_ratio: hidden features of the MLPs over `width` (rounded down).
    extrinsics: also take the camera's, which have one number less.
    layout: see `ops.rope.Layout`; 'tiled' for released weights.
    gate: see `nn.transformer.Gate`.
    norm_eps: epsilon of the LayerNorms.
    scan: compile one block and loop over it.
    remat: see `nn.transformer.Stack`.
    impl: attention implementation, see `ops.attention`.
    dtype: compute type; parameters are float32.
  """

  width: int = 1024
  depth: int = 24
  heads: int = 16
  mlp_ratio: float = 4.0
  extrinsics: bool = False
  layout: rope.Layout = 'paired'
  gate: Gate = 'none'
  norm_eps: float = 1e-6
  scan: bool = False
  remat: Remat = 'none'
  impl: str = 'auto'
  dtype: Literal['float32', 'bfloat16', 'float16'] = 'float32'

  def setup(self):
    """Make the submodules (called by Flax)."""
    block = _block(self)
    self.stack = Stack(self.depth, block, 0.0, self.scan, self.remat)
    nn.share_scope(self, self.stack)

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    actions: jax.Array,
    states: jax.Array,
    extrinsics: jax.Array | None = None,
    *,
    grid: tok.Grid,
  ) -> jax.Array:
    """Predict the tokens that follow those of each frame.

    Args:
      tokens: [B, T'*H'*W', D] features of all frames.
      actions: f32 [B, T', A], 7 of a robot's arm.
      states: f32 [B, T', A].
      extrinsics: f32 [B, T', A - 1], for a predictor that takes them.
      grid: (T', H', W') of the tokens.

    Returns:
      float32 [B, T'*H'*W', D].

    Raises:
      ValueError: extrinsics are missing or of no use, or the number of tokens
        is not that of the grid.
    """
    (b, n, features), (t, h, w) = tokens.shape, grid
    if n != t * h * w:
      raise ValueError(
        f'expected {t * h * w} tokens for grid {grid}, found {n}'
      )
    if self.extrinsics != (extrinsics is not None):
      raise ValueError(
        f'a predictor with `extrinsics` {self.extrinsics} takes '
        f'{"them" if self.extrinsics else "none"}, found '
        f'{"none" if extrinsics is None else extrinsics.shape}'
      )

    def dense(name, x, width=self.width):
      return layers.Dense(
        width, dtype=self.dtype, kernel_init=_NORMAL, name=name
      )(x)

    given = {'action': actions, 'state': states, 'extrinsics': extrinsics}
    prefix = [
      dense(k, x)[:, :, None] for k, x in given.items() if x is not None
    ]
    x = dense('embed', tokens).reshape(b, t, h * w, -1)
    x = jnp.concatenate([*prefix, x], axis=2)
    per_frame = x.shape[2]
    x, _ = self.stack(
      x.reshape(b, t * per_frame, -1),
      cond=Placement(
        self._rotation(grid, len(prefix)),
        jnp.asarray(frame_causal(t, per_frame)),
      ),
    )
    x = x.reshape(b, t, per_frame, -1)[:, :, len(prefix) :].reshape(b, n, -1)
    x = layers.LayerNorm(self.norm_eps, self.dtype, name='norm')(x)
    return dense('proj', x, features).astype(jnp.float32)

  def _rotation(self, grid, prefix):
    """Return the rotation of all tokens, each frame's prefix at (t, 0, 0).

    Columns are counted in the unit of rows: the released code scales both axes
    to as many cells as there are rows.
    """
    t, h, w = grid
    place = rope.coordinates(grid).reshape(t, h * w, 3)
    place = place * np.array([1.0, 1.0, h / w], np.float32)
    front = np.zeros((t, prefix, 3), np.float32)
    front[..., 0] = np.arange(t)[:, None]
    place = np.concatenate([front, place], axis=1).reshape(-1, 3)
    return rope.rotation(
      jnp.asarray(place), self.width // self.heads, self.layout
    )


def frame_causal(frames: int, per_frame: int) -> np.ndarray:
  """Return which tokens see which, bool [N, N]: their own frame and earlier."""
  frame = np.arange(frames).repeat(per_frame)
  return frame[:, None] >= frame


_NORMAL = layers.trunc_normal(0.02, 2.0)


def _block(model: LatentPredictor | ActionPredictor) -> Block:
  """Return the block of a predictor."""
  return Block(
    heads=model.heads,
    mlp_width=int(model.width * model.mlp_ratio),
    qkv_bias='full',
    norm_eps=model.norm_eps,
    impl=model.impl,
    dtype=model.dtype,
    kernel_init=_NORMAL,
    gate=model.gate,
  )
