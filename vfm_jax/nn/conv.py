"""Build convolutional networks that only give features.

Everything is computed in float32, on every device, for metrics depend on it.
"""

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

_HIGHEST = jax.lax.Precision.HIGHEST


class FrozenNorm(nn.Module):
  """Normalise by recorded moments, as batch norm does at inference.

  Attributes:
    epsilon: added to the variance.
  """

  epsilon: float = 1e-3

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Return f32 [..., C]."""
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    width = x.shape[-1:]
    scale = self.param('scale', ones, width)
    bias = self.param('bias', zeros, width)
    mean = self.param('mean', zeros, width)
    var = self.param('var', ones, width)
    gain = scale / jnp.sqrt(var + self.epsilon)
    return x * gain + (bias - mean * gain)


class ConvNorm(nn.Module):
  """Convolve, normalise and rectify.

  Attributes:
    width: channels of the output.
    kernel: height and width of the kernel.
    stride: of both axes.
    padding: `SAME` cuts uneven padding as TensorFlow does.
    act: the rectifier; None for none.
  """

  width: int
  kernel: tuple[int, int] = (1, 1)
  stride: int = 1
  padding: Literal['SAME', 'VALID'] = 'SAME'
  act: Callable[[jax.Array], jax.Array] | None = nn.relu

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Return f32 [B, H', W', width] of x f32 [B, H, W, C]."""
    shape = (*self.kernel, x.shape[-1], self.width)
    kernel = self.param('kernel', nn.initializers.lecun_normal(), shape)
    if self.kernel == (1, 1) and self.stride == 1:
      # The same numbers, faster on a CPU.
      x = jnp.matmul(x, kernel[0, 0], precision=_HIGHEST)
    else:
      x = jax.lax.conv_general_dilated(
        x,
        kernel,
        (self.stride, self.stride),
        self.padding,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        precision=_HIGHEST,
      )
    x = FrozenNorm(name='norm')(x)
    return x if self.act is None else self.act(x)


class DepthwiseNorm(nn.Module):
  """Convolve each channel on its own (`SAME`), normalise and rectify.

  Attributes:
    kernel: height and width of the kernel.
    stride: of both axes.
    act: the rectifier.
  """

  kernel: int = 3
  stride: int = 1
  act: Callable[[jax.Array], jax.Array] = nn.relu

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Return f32 [B, H', W', C] of x f32 [B, H, W, C]."""
    shape = (self.kernel, self.kernel, x.shape[-1])
    weight = self.param('kernel', nn.initializers.lecun_normal(), shape)
    x = depthwise(x, weight, self.stride)
    return self.act(FrozenNorm(name='norm')(x))


def depthwise(x: jax.Array, weight: jax.Array, stride: int = 1) -> jax.Array:
  """Convolve each channel on its own (`SAME`), as a sum of shifted images.

  XLA's grouped convolution is 5 to 20 times slower on a CPU.

  Args:
    x: [B, H, W, C].
    weight: [K, K, C], of the type of x.
    stride: of both axes.
  """
  size, (b, h, w, c) = weight.shape[0], x.shape
  out, pads = [], [(0, 0)]
  for n in (h, w):
    out.append(-(-n // stride))
    pad = max((out[-1] - 1) * stride + size - n, 0)
    # Filled up to whole strides; what is added last is never read.
    rest = -(n + pad) % stride
    pads.append((pad // 2, pad - pad // 2 + rest))
  x = jnp.pad(x, (*pads, (0, 0)))
  # Each phase of the stride is an image of its own: slices without gaps.
  x = x.reshape(
    b, x.shape[1] // stride, stride, x.shape[2] // stride, stride, c
  )
  total = jnp.zeros((b, *out, c), x.dtype)
  for i in range(size):
    for j in range(size):
      phase = x[:, :, i % stride, :, j % stride]
      top, left = i // stride, j // stride
      tap = phase[:, top : top + out[0], left : left + out[1]]
      total += tap * weight[i, j]
  return total
