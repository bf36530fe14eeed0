"""Mix a map by convolution in some channels and by attention in the others.

The inception mixer of iFormer (arXiv:2205.12956): convolution and max-pooling
keep what is high in frequency, attention what is low. MEME
(arXiv:2306.04990) builds a denoiser for each range of noise levels with it,
with more convolution where there is less noise. MEME's code is not public: the
block here is iFormer's, and the shares in `SHARES` are ours.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from vfm_jax.nn import layers
from vfm_jax.nn.conv import depthwise
from vfm_jax.nn.transformer import QKV
from vfm_jax.ops import resize
from vfm_jax.ops.attention import attention

# Share of convolved channels by expert, the cleanest first, and by stage, the
# finest first. Ours: what is told of MEME in second hand is 5/8 and 1/4 in the
# second stage and 1/4 and 1/16 in the last one, for the first and last expert,
# and that shares fall with depth and with noise; the rest is between these.
SHARES = (
  (3 / 4, 5 / 8, 1 / 2, 1 / 4),
  (5 / 8, 1 / 2, 3 / 8, 3 / 16),
  (1 / 2, 3 / 8, 1 / 4, 1 / 8),
  (3 / 8, 1 / 4, 1 / 8, 1 / 16),
)


@dataclasses.dataclass(frozen=True)
class Mixing:
  """Say how a network mixes at each depth.

  Attributes:
    shares: of the channels that are convolved, for each part of the network
      from the input on: each stage of a U-Net, equal parts of the depth of a
      transformer.
    pools: side of the squares that attention takes the mean of, by part.
    head_dim: channels of a head of attention.
  """

  shares: tuple[float, ...]
  pools: tuple[int, ...]
  head_dim: int = 32

  def __post_init__(self):
    """Refuse what fits no network."""
    if not self.shares or len(self.shares) != len(self.pools):
      raise ValueError(
        'expected one of `denoiser.mixing.pools` for each of '
        f'`denoiser.mixing.shares`, found {self.pools} and {self.shares}'
      )
    if any(not 0 <= s <= 1 for s in self.shares) or min(self.pools) < 1:
      raise ValueError(
        'expected `denoiser.mixing.shares` from 0 to 1 and '
        f'`denoiser.mixing.pools` of at least 1, found {self.shares} and '
        f'{self.pools}'
      )

  def mixer(self, part: int) -> Callable[..., 'Mixer']:
    """Return what makes the mixers of a part; it takes their other fields."""
    return functools.partial(
      Mixer, self.shares[part], self.pools[part], self.head_dim
    )

  def by_depth(self, depth: int) -> list[Callable[..., 'Mixer']]:
    """Return what makes the mixer of each of `depth` blocks: equal parts."""
    parts = len(self.shares)
    return [self.mixer(i * parts // depth) for i in range(depth)]


def stages(expert: int) -> Mixing:
  """Return the mixing of one of four experts for a U-Net of four stages.

  The shares are ours, see `SHARES`; the pools are those of iFormer.

  Args:
    expert: 0, for the least noise, to 3.
  """
  return Mixing(SHARES[expert], (2, 2, 1, 1))


def thirds(expert: int) -> Mixing:
  """Return the mixing of one of four experts for a transformer: ours.

  Thirds of the depth stand for all stages but the finest.

  Args:
    expert: 0, for the least noise, to 3.
  """
  return Mixing(SHARES[expert][1:], (1, 1, 1))


def split(width: int, share: float, head_dim: int = 32) -> tuple[int, int]:
  """Return how many channels are convolved and how many attend.

  The second number is the multiple of `head_dim` nearest to (1 - share) width
  that leaves both at least `head_dim`; shares of 0 and 1 are kept exactly. The
  first number is even, for its halves go two ways. (The rule is ours.)

  Args:
    width: all channels.
    share: of the channels that are convolved, 0 to 1.
    head_dim: channels of a head.

  Raises:
    ValueError: there is no such split.
  """
  low = round((1 - share) * width)
  if 0 < share < 1:
    most = width // head_dim - 1
    low = head_dim * max(1, min(most, round((1 - share) * width / head_dim)))
  high = width - low
  if low % head_dim or high % 2 or high < (0 < share < 1) * head_dim:
    raise ValueError(
      f'expected a width that splits into attention in heads of {head_dim} '
      f'and an even rest, found {width} with a share of {share:g}; change '
      '`denoiser.width`, `denoiser.mixing.head_dim` or `.shares`'
    )
  return high, low


class Mixer(nn.Module):
  """Mix a map over space (iFormer), without norm and residual.

  Of D channels the first d_h are convolved: a half by a 3x3 depthwise one
  after a linear layer, the other half through 3x3 max-pooling and a linear
  layer, each giving d_h channels and a GELU. The other d_l attend, without an
  output projection. A depthwise 3x3 convolution with a residual and a linear
  layer bring the 2 d_h + d_l channels together.

  Attributes:
    share: about d_h / D, see `split`; 0 only attends, 1 only convolves.
    pool: side of the squares whose means attend; the result is repeated.
    head_dim: channels of a head.
    impl: attention implementation, see `ops.attention`.
    dtype: compute type.
    kernel_init: initialiser of the linear layers; the depthwise kernels start
      as torch's do.
  """

  share: float
  pool: int = 1
  head_dim: int = 32
  impl: str = 'auto'
  dtype: layers.Dtype = 'float32'
  kernel_init: nn.initializers.Initializer = layers.xavier_uniform()

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Return [B, H, W, D] of x [B, H, W, D].

    Raises:
      ValueError: `pool` does not divide H or W, or D does not split.
    """
    high, low = split(x.shape[-1], self.share, self.head_dim)
    parts = []
    if high:
      first, second = jnp.split(x[..., :high], 2, axis=-1)
      parts += [self._convolved(first, high), self._pooled(second, high)]
    if low:
      parts.append(self._attended(x[..., high:]))
    h = jnp.concatenate(parts, axis=-1)
    h = h + Depthwise(self.dtype, name='fuse_depthwise')(h)
    return self._dense(x.shape[-1], 'fuse')(h)

  def _convolved(self, x, width):
    h = self._dense(width, 'high_conv', use_bias=False)(x)
    h = Depthwise(self.dtype, name='high_depthwise')(h)
    return jax.nn.gelu(h, approximate=False)

  def _pooled(self, x, width):
    h = nn.max_pool(x, (3, 3), padding='SAME')
    h = self._dense(width, 'high_pool')(h)
    return jax.nn.gelu(h, approximate=False)

  def _attended(self, x):
    b, height, width, c = x.shape
    s = self.pool
    if height % s or width % s:
      raise ValueError(
        f'expected a map whose sides {s} divides (`denoiser.mixing.pools`), '
        f'found {height} x {width}; change it or the size of the data'
      )
    h = x.reshape(b, height // s, s, width // s, s, c).mean((2, 4))
    q, k, v = QKV(
      c // self.head_dim, True, self.dtype, self.kernel_init, name='qkv'
    )(h.reshape(b, -1, c))
    h = attention(q, k, v, impl=self.impl).reshape(h.shape)
    return resize.repeat(h, s)

  def _dense(self, width, name, *, use_bias=True):
    return layers.Dense(
      width,
      use_bias=use_bias,
      dtype=self.dtype,
      kernel_init=self.kernel_init,
      name=name,
    )


class Depthwise(nn.Module):
  """Convolve each channel by a 3x3 kernel of its own, without a bias.

  Attributes:
    dtype: compute type.
  """

  dtype: layers.Dtype = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Return [B, H, W, C] of x [B, H, W, C]."""
    init = layers.uniform_fan_in(9)
    kernel = self.param('kernel', init, (3, 3, x.shape[-1]))
    return depthwise(x.astype(self.dtype), kernel.astype(self.dtype))


class MixerBlock(nn.Module):
  """Add a mixer and an MLP to a map, each on its LayerNorm.

  Attributes:
    mixer: what makes the mixer, see `Mixing.mixer`.
    mlp_ratio: hidden features of the MLP over D; 0 for no MLP.
    norm_eps: epsilon of the LayerNorms.
    impl: attention implementation.
    dtype: compute type.
    kernel_init: initialiser of the linear layers.
  """

  mixer: Callable[..., Mixer]
  mlp_ratio: float = 4.0
  norm_eps: float = 1e-6
  impl: str = 'auto'
  dtype: layers.Dtype = 'float32'
  kernel_init: nn.initializers.Initializer = layers.xavier_uniform()

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Return x [B, H, W, D] after the block."""
    shared = dict(dtype=self.dtype, kernel_init=self.kernel_init)
    mixer = self.mixer(impl=self.impl, name='mixer', **shared)
    x = x + mixer(layers.LayerNorm(self.norm_eps, self.dtype, name='norm1')(x))
    if not self.mlp_ratio:
      return x
    hidden = int(x.shape[-1] * self.mlp_ratio)
    mlp = layers.Mlp(hidden, name='mlp', **shared)
    return x + mlp(layers.LayerNorm(self.norm_eps, self.dtype, name='norm2')(x))
