"""Predict the features of a teacher from those of an encoder."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from vfm_jax.nn import layers
from vfm_jax.ops import positions as pos
from vfm_jax.ops import tokens as tok


class AlignedHeads(nn.Module):
  """Map each of several layers to a teacher's features, by a head of its own.

  Positions are added to the tokens, then come a linear layer, a LayerNorm and
  the L2 norm (UMT, arXiv:2303.16058).

  Attributes:
    positions: fixed position table that is added, see `VideoViT`.
    image_positions: see `VideoViT`.
    resample: see `VideoViT`.
    normalise: 'l2' for unit vectors, or 'none'.
    norm_eps: epsilon of the LayerNorms.
    dtype: compute type of the linear layers; parameters are float32.
  """

  positions: pos.Kind | Literal['none'] = 'flat_sinusoid'
  image_positions: pos.ImageKind = 'first_slice'
  resample: pos.Resample = 'linear'
  normalise: Literal['l2', 'none'] = 'l2'
  norm_eps: float = 1e-6
  dtype: Literal['float32', 'bfloat16', 'float16'] = 'float32'

  @nn.compact
  def __call__(
    self,
    tapped: Sequence[jax.Array],
    visible_idx: jax.Array,
    *,
    features: int,
    grid: tok.Grid,
    built_grid: tok.Grid,
  ) -> jax.Array:
    """Predict the features of the tokens `visible_idx`.

    Args:
      tapped: K times [B, n, D], normalised.
      visible_idx: int32 [B, n] their token numbers.
      features: of the teacher.
      grid: (T', H', W') of the input.
      built_grid: the grid that the positions are built for.

    Returns:
      float32 [K, B, n, features].
    """
    table = None
    if self.positions != 'none':
      table = pos.fixed_table(self.positions, tapped[0].shape[-1], built_grid)
      table = pos.fit_table(
        jnp.asarray(table),
        built_grid,
        grid,
        self.image_positions,
        self.resample,
      )
      table = tok.take(table, visible_idx)
    out = []
    for k, x in enumerate(tapped):
      if table is not None:
        x = x + table.astype(x.dtype)
      x = layers.Dense(
        features,
        dtype=self.dtype,
        kernel_init=layers.xavier_uniform(),
        name=f'head_{k}',
      )(x)
      out.append(layers.LayerNorm(self.norm_eps, name=f'norm_{k}')(x))
    x = jnp.stack(out)
    return layers.unit(x) if self.normalise == 'l2' else x
