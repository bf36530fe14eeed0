"""Give image features by EfficientNet-lite0.

The lite variant of EfficientNet (arXiv:1905.11946) has no squeeze and
excitation, ReLU6 for the rectifier, and a stem and head of fixed width.
"""

import flax.linen as nn
import jax

from vfm_jax.nn.conv import ConvNorm, DepthwiseNorm

WIDTH = 1280

# Width, kernel, stride of the first, expansion and number of the blocks.
_STAGES = (
  (16, 3, 1, 1, 1),
  (24, 3, 2, 6, 2),
  (40, 5, 2, 6, 2),
  (80, 3, 2, 6, 3),
  (112, 5, 1, 6, 3),
  (192, 5, 2, 6, 4),
  (320, 3, 1, 6, 1),
)


class EfficientNetLite0(nn.Module):
  """Turn images into the means of the last feature maps.

  Attributes:
    tap: number of a block whose feature maps are returned in place of the
      means; None for the means.
  """

  tap: int | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Return f32 [B, 1280] of x f32 [B, H, W, 3], (pixel - 127) / 128.

    With `tap` maps f32 [B, H / s, W / s, C], with s and C of `shape_of`.
    """
    x = ConvNorm(32, (3, 3), 2, act=nn.relu6, name='stem')(x)
    count = 0
    for width, kernel, stride, expand, repeats in _STAGES:
      for i in range(repeats):
        x = MBConv(
          width, kernel, 1 if i else stride, expand, name=f'blocks_{count}'
        )(x)
        if count == self.tap:
          return x
        count += 1
    x = ConvNorm(WIDTH, act=nn.relu6, name='head')(x)
    return x.mean((1, 2))


def shape_of(tap: int) -> tuple[int, int]:
  """Return stride and channels of the maps of a block.

  Raises:
    ValueError: there is no such block.
  """
  shapes, total = [], 2
  for width, _, stride, _, repeats in _STAGES:
    total *= stride
    shapes += [(total, width)] * repeats
  if not 0 <= tap < len(shapes):
    raise ValueError(
      f'expected a block from 0 to {len(shapes) - 1} as `tap`, found {tap}'
    )
  return shapes[tap]


class MBConv(nn.Module):
  """Widen, convolve each channel and narrow, around a residual.

  Attributes:
    width: channels of the output.
    kernel: height and width of the kernel.
    stride: of both axes.
    expand: how much wider the middle is than the input.
  """

  width: int
  kernel: int
  stride: int
  expand: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Return f32 [B, H', W', width] of x f32 [B, H, W, C]."""
    c, inputs = x.shape[-1], x
    if self.expand != 1:
      x = ConvNorm(c * self.expand, act=nn.relu6, name='expand')(x)
    x = DepthwiseNorm(self.kernel, self.stride, nn.relu6, name='depthwise')(x)
    x = ConvNorm(self.width, act=None, name='project')(x)
    return x + inputs if self.stride == 1 and c == self.width else x
