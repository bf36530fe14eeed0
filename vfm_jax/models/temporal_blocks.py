"""Provide the blocks of temporal detectors: ActionFormer's, on masked features.

Features are [B, T, C] with a bool mask [B, T], True where a step is real.
Each convolution clears what the mask hides, but a layer norm after it does not:
its bias stands at hidden steps and reaches one step back through the next
convolution. Released weights expect that order (Zhang et al. 2022 and its
code; the head of the TWLV-I evaluation framework, arXiv 2408.11318).
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vfm_jax.nn.layers import Dense, LayerNorm, drop_path, uniform_fan_in
from vfm_jax.ops import keys as keys_lib
from vfm_jax.ops import linear
from vfm_jax.ops.attention import attention
from vfm_jax.ops.banded import banded_attention

Level = tuple[jax.Array, jax.Array]

# Added to the variance by every layer norm.
EPS = 1e-5


class MaskedConv(nn.Module):
  """Convolve over time, then clear what the mask hides.

  Attributes:
    width: features of the output.
    kernel: taps, an odd number; zeros surround the sequence.
    stride: steps from one output to the next.
    depthwise: each feature has its own taps and sees no other.
    bias: initial value of a learned bias; None for none.
  """

  width: int
  kernel: int = 3
  stride: int = 1
  depthwise: bool = False
  bias: float | None = None

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> Level:
    """Return [B, ceil(T / stride), width] and its mask."""
    inputs = 1 if self.depthwise else x.shape[-1]
    shape = (self.kernel, inputs, self.width)
    kernel = self.param('kernel', uniform_fan_in(self.kernel * inputs), shape)
    mask = mask[:, :: self.stride]
    taps = _taps(x, self.kernel, self.stride, mask.shape[1])
    if self.depthwise:
      y = sum(tap * weight for tap, weight in zip(taps, kernel, strict=True))
    else:
      rows = kernel.reshape(-1, self.width)
      y = linear.matmul(jnp.concatenate(taps, axis=-1), rows)
    if self.bias is not None:
      init = nn.initializers.constant(self.bias)
      y += self.param('bias', init, (self.width,))
    return y * mask[..., None], mask


class ConvAttention(nn.Module):
  """Attend with queries, keys and values that are convolved first.

  Attributes:
    heads: attention heads.
    window: steps that a query sees, centred on it; global if not above 1.
    stride: of the convolutions, 1 or 2.
    relative: learn a bias of each head for each place in the window.
  """

  heads: int
  window: int
  stride: int = 1
  relative: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> Level:
    """Return [B, T / stride, C] and its mask."""
    width = x.shape[-1]
    below = mask[:, :: self.stride]
    # Queries, keys and values are made side by side: [B, T', 3, C].
    init = uniform_fan_in(3)
    kernel = self.param('conv_kernel', init, (3, 3, width))
    taps = _taps(x[:, :, None], 3, self.stride, below.shape[1])
    y = sum(tap * weight for tap, weight in zip(taps, kernel, strict=True))
    y = LayerNorm(EPS, affine=False, name='norm')(y * below[..., None, None])
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    y = y * self.param('norm_scale', ones, (3, width))
    y = y + self.param('norm_bias', zeros, (3, width))
    kernel = self.param('kernel', uniform_fan_in(width), (3, width, width))
    bias = self.param('bias', zeros, (3, width))
    y = jnp.einsum('btsc,scd->btsd', y, kernel) + bias
    q, k, v = jnp.moveaxis(y.reshape(*y.shape[:3], self.heads, -1), 2, 0)
    if self.window > 1:
      half = self.window // 2
      out = banded_attention(
        q, k, v, half=half, valid=below, bias=self._bias(width, 2 * half + 1)
      )
    else:
      out = attention(q, k, v, mask=below[:, None, None, :])
    out = _dense(width, 'proj')(out.reshape(*out.shape[:2], width))
    return out * below[..., None], below

  def _bias(self, width: int, places: int) -> jax.Array | None:
    if not self.relative:
      return None
    init = nn.initializers.truncated_normal((2.0 / width) ** 0.5)
    return self.param('relative', init, (self.heads, places))


class TransformerBlock(nn.Module):
  """Attend and mix features, before each a norm; optionally halve the time.

  Attributes:
    heads: attention heads.
    window: steps that a query sees; global if not above 1.
    stride: 1 or 2.
    relative: see `ConvAttention`.
    drop_path: probability to leave a branch out in training.
  """

  heads: int
  window: int
  stride: int = 1
  relative: bool = False
  drop_path: float = 0.1

  @nn.compact
  def __call__(
    self, x: jax.Array, mask: jax.Array, keys: jax.Array | None = None
  ) -> Level:
    """Return [B, T / stride, C] and its mask.

    Args:
      x: [B, T, C].
      mask: bool [B, T].
      keys: one an example, [B], to drop branches with; None drops none.
    """
    width = x.shape[-1]
    attend = ConvAttention(
      self.heads, self.window, self.stride, self.relative, name='attn'
    )
    out, below = attend(LayerNorm(EPS, name='ln1')(x), mask)
    real = below[..., None]
    if self.stride > 1:
      # The largest of the three steps around each step that is kept.
      near = _taps(x, 3, self.stride, below.shape[1], fill=-jnp.inf)
      x = functools.reduce(jnp.maximum, near)
    x = x * real + self._branch(out, keys, 0)
    h = LayerNorm(EPS, name='ln2')(x)
    h = jax.nn.gelu(_dense(4 * width, 'fc1')(h), approximate=False)
    return x + self._branch(_dense(width, 'fc2')(h) * real, keys, 1), below

  def _branch(self, x, keys, number):
    names = ('scale_attn', 'scale_mlp')
    init = nn.initializers.constant(1e-4)
    x = x * self.param(names[number], init, (x.shape[-1],))
    if keys is None or not self.drop_path:
      return x
    return drop_path(x, self.drop_path, keys_lib.fold(keys, number))


class ConvBlock(nn.Module):
  """Convolve twice beside a shortcut; optionally halve the time.

  Attributes:
    stride: 1 or 2.
  """

  stride: int = 1

  @nn.compact
  def __call__(
    self, x: jax.Array, mask: jax.Array, keys: jax.Array | None = None
  ) -> Level:
    """Return [B, T / stride, C] and its mask; nothing is dropped."""
    del keys
    width = x.shape[-1]
    wide = MaskedConv(2 * width, stride=self.stride, bias=0.0, name='conv1')
    h, below = wide(x, mask)
    h, _ = MaskedConv(width, bias=0.0, name='conv2')(nn.relu(h), below)
    if self.stride > 1:
      shortcut = MaskedConv(width, 1, self.stride, bias=0.0, name='downsample')
      x, _ = shortcut(x, mask)
    return nn.relu(h + x), below


def _taps(
  x: jax.Array, kernel: int, stride: int, count: int, fill: float = 0.0
) -> list[jax.Array]:
  """Return what each tap of a kernel meets: arrays of `count` steps."""
  pad, rest = kernel // 2, ((0, 0),) * (x.ndim - 2)
  x = jnp.pad(x, ((0, 0), (pad, pad), *rest), constant_values=fill)
  last = stride * (count - 1) + 1
  return [x[:, i : i + last : stride] for i in range(kernel)]


def _dense(width: int, name: str) -> nn.Module:
  # torch draws from U(+-1 / sqrt(inputs)); the release then clears the biases.
  init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
  return Dense(width, kernel_init=init, name=name)
