"""Find actions in time: at each point of a pyramid, classes and two distances.

The single-stage detector without anchors of ActionFormer (Zhang et al. 2022),
as the TWLV-I evaluation framework (arXiv 2408.11318, section 4.5) trains it on
frozen clip embeddings.
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vfm_jax.models.temporal_blocks import EPS, Level, MaskedConv
from vfm_jax.models.temporal_pyramid import Norms, Pyramid
from vfm_jax.nn.layers import LayerNorm


class Found(NamedTuple):
  """Hold what the detector says at each level, the finest first.

  Attributes:
    logits: f32 [B, T_l, C] of each level.
    offsets: f32 [B, T_l, 2], 0 or more: distance to start and end, in strides
      of the level.
    masks: bool [B, T_l].
  """

  logits: tuple[jax.Array, ...]
  offsets: tuple[jax.Array, ...]
  masks: tuple[jax.Array, ...]

  def video(self, row: int) -> 'Found':
    """Return one video, its arrays without the batch axis."""
    return Found(*(tuple(x[row] for x in part) for part in self))


class Head(nn.Module):
  """Convolve every level by the same weights.

  Attributes:
    outputs: features of the last convolution.
    width: features of those before it.
    layers: convolutions in all.
    norm: normalise after all but the last, which have no bias then.
    bias: initial value of the last bias.
  """

  outputs: int
  width: int = 256
  layers: int = 3
  norm: bool = True
  bias: float = 0.0

  @nn.compact
  def __call__(
    self, x: jax.Array, mask: jax.Array, inside: np.ndarray
  ) -> jax.Array:
    """Return [B, S, outputs].

    Args:
      x: [B, S, C] levels one after the other, with a gap between them.
      mask: bool [B, S].
      inside: bool [S], False in the gaps, which stay 0 so that no level sees
        the next.
    """
    bias = None if self.norm else 0.0
    for i in range(self.layers - 1):
      x, _ = MaskedConv(self.width, bias=bias, name=f'conv_{i}')(x, mask)
      if self.norm:
        x = LayerNorm(EPS, name=f'norm_{i}')(x) * inside[:, None]
      x = nn.relu(x)
    return MaskedConv(self.outputs, bias=self.bias, name='last')(x, mask)[0]


class TemporalDetector(nn.Module):
  """Find actions in sequences of features.

  Attributes:
    num_classes: C; 1 finds actions of any class.
    pyramid: the backbone.
    neck: `Norms` or `TopDown`.
    head_width: features of the heads.
    head_layers: convolutions of each head.
    head_norm: normalise in the heads.
    prior: probability of each class that a new head gives at every point.
  """

  num_classes: int
  pyramid: Pyramid = Pyramid()
  neck: nn.Module = Norms()
  head_width: int = 256
  head_layers: int = 3
  head_norm: bool = True
  prior: float = 0.01

  @nn.compact
  def __call__(
    self, x: jax.Array, mask: jax.Array, keys: jax.Array | None = None
  ) -> Found:
    """Return classes and distances at each point.

    Args:
      x: f32 [B, T, D] features; 2^(levels - 1) divides T.
      mask: bool [B, T], True where they are real.
      keys: one an example, [B], to drop branches with; None, as in
        evaluation, drops none.
    """
    levels = self.neck(self.pyramid(x, mask, keys))
    joined, mask, ends = _join(levels)
    inside = np.zeros(joined.shape[1], bool)
    for start, end in ends:
      inside[start:end] = True
    shape = self.head_width, self.head_layers, self.head_norm
    bias = -math.log((1 - self.prior) / self.prior)
    classify = Head(self.num_classes, *shape, bias=bias, name='classify')
    measure = Head(2, *shape, name='measure')
    logits = classify(joined, mask, inside)
    offsets = measure(joined, mask, inside)
    scales = self.param('scale', nn.initializers.ones, (len(levels),))
    return Found(
      tuple(logits[:, a:b] for a, b in ends),
      tuple(
        nn.relu(offsets[:, a:b] * scale)
        for (a, b), scale in zip(ends, scales, strict=True)
      ),
      tuple(mask for _, mask in levels),
    )

  @property
  def levels(self) -> int:
    """Number of levels of the pyramid."""
    return len(self.pyramid.windows)

  @property
  def divisor(self) -> int:
    """Length whose multiples the released detector pads sequences to.

    Twice half a window of each level, in steps of the finest one.
    """
    return max(
      2**level * max(2 * (window // 2), 1)
      for level, window in enumerate(self.pyramid.windows)
    )


def _join(levels: list[Level]) -> tuple[jax.Array, jax.Array, list]:
  """Return levels in one array with gaps of a step, and where each lies."""
  parts, masks, ends, at = [], [], [], 0
  for x, mask in levels:
    parts.append(jnp.pad(x, ((0, 0), (0, 1), (0, 0))))
    masks.append(jnp.pad(mask, ((0, 0), (0, 1))))
    ends.append((at, at + x.shape[1]))
    at += x.shape[1] + 1
  return jnp.concatenate(parts, 1), jnp.concatenate(masks, 1), ends
