"""Build a pyramid of features over time: ActionFormer's backbone and necks."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vfm_jax.models.temporal_blocks import (
  EPS,
  ConvBlock,
  Level,
  MaskedConv,
  TransformerBlock,
)
from vfm_jax.nn.layers import LayerNorm
from vfm_jax.ops import keys as keys_lib
from vfm_jax.ops import positions


class Pyramid(nn.Module):
  """Embed features and halve the time level by level.

  Attributes:
    windows: steps that attention sees at each level, finest first; global if
      not above 1. Their number is that of the levels.
    width: features.
    heads: attention heads.
    embed: convolutions in front, each with a norm and a rectifier.
    stem: blocks at the finest level.
    block: 'transformer', or 'conv' without attention.
    positions: 'sinusoid' adds a fixed table.
    table: steps of that table; longer inputs stretch it.
    relative: see `ConvAttention`.
    drop_path: probability to leave a branch out in training.
  """

  windows: tuple[int, ...] = (19,) * 6
  width: int = 256
  heads: int = 4
  embed: int = 2
  stem: int = 2
  block: Literal['transformer', 'conv'] = 'transformer'
  positions: Literal['none', 'sinusoid'] = 'none'
  table: int = 2304
  relative: bool = False
  drop_path: float = 0.1

  @nn.compact
  def __call__(
    self, x: jax.Array, mask: jax.Array, keys: jax.Array | None = None
  ) -> list[Level]:
    """Return [B, T / 2^l, width] and its mask for each level l.

    Args:
      x: [B, T, D].
      mask: bool [B, T].
      keys: one an example, [B], to drop branches with; None drops none.
    """
    x = x * mask[..., None]
    for i in range(self.embed):
      x, _ = MaskedConv(self.width, name=f'embed_{i}')(x, mask)
      x = nn.relu(LayerNorm(EPS, name=f'embed_norm_{i}')(x))
    if self.positions == 'sinusoid':
      x += self._table(x.shape[1]) * mask[..., None]
    levels = []
    for i in range(self.stem + len(self.windows) - 1):
      level = max(i - self.stem + 1, 0)
      own = None if keys is None else keys_lib.fold(keys, i)
      x, mask = self._block(level, 2 if level else 1, f'blocks_{i}')(
        x, mask, own
      )
      levels.append((x, mask))
    return levels[self.stem - 1 :]

  def _block(self, level: int, stride: int, name: str) -> nn.Module:
    if self.block == 'conv':
      return ConvBlock(stride, name=name)
    return TransformerBlock(
      self.heads,
      self.windows[level],
      stride,
      self.relative,
      self.drop_path,
      name=name,
    )

  def _table(self, length: int) -> jax.Array:
    table = positions.flat_sinusoid(np.arange(self.table), self.width)
    table = jnp.asarray(table * self.width**-0.5, jnp.float32)
    if length > self.table:
      shape = (length, self.width)
      table = jax.image.resize(table, shape, 'linear', antialias=False)
    return table[:length]


class Norms(nn.Module):
  """Normalise each level on its own: the neck that changes nothing else."""

  @nn.compact
  def __call__(self, levels: list[Level]) -> list[Level]:
    """Return the levels [B, T_l, C], normalised."""
    return [
      (LayerNorm(EPS, name=f'norm_{i}')(x), mask)
      for i, (x, mask) in enumerate(levels)
    ]


class TopDown(nn.Module):
  """Add coarser levels to finer ones (Lin et al. 2017), then normalise.

  Attributes:
    width: features of the output.
  """

  width: int = 256

  @nn.compact
  def __call__(self, levels: list[Level]) -> list[Level]:
    """Return [B, T_l, width] and its mask for each level."""
    out, above = [], None
    for i, (x, mask) in reversed(list(enumerate(levels))):
      x, _ = MaskedConv(self.width, 1, name=f'lateral_{i}')(x, mask)
      above = x if above is None else x + jnp.repeat(above, 2, axis=1)
      smooth = MaskedConv(self.width, depthwise=True, name=f'smooth_{i}')
      y, _ = smooth(above, mask)
      out.append((LayerNorm(EPS, name=f'norm_{i}')(y), mask))
    return out[::-1]
