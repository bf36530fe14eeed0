"""Denoise images with a U-Net of residual blocks and attention or mixers.

The network of latent diffusion (arXiv:2112.10752), which is that of ADM
(arXiv:2105.05233) with the time added in each residual block. In MEME
(arXiv:2306.04990) mixers of convolution and attention take the place of its
attention; how they are placed here is reconstructed, see `nn.mixer`.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from vfm_jax.models.labels import Labelled
from vfm_jax.nn import adaln, layers
from vfm_jax.nn.mixer import MixerBlock, Mixing
from vfm_jax.nn.transformer import QKV
from vfm_jax.ops import resize
from vfm_jax.ops.attention import attention

# U(+-1/sqrt(fan_in)), as torch starts its layers.
_TORCH = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


class UNet(Labelled, nn.Module):
  """Map noisy images [B, H, W, C] to a prediction, zero at first.

  Each stage but the last halves the sides and has `blocks` residual blocks on
  the way down and one more on the way up. Convolutions start as torch's do, and
  what ends a residual block, attention and the network at zero.

  Attributes:
    channels: C of the input.
    width: channels of the stem; groups divide it.
    multipliers: channels of each stage over `width`, the finest stage first.
    blocks: residual blocks of a stage on the way down.
    spatial: stages whose residual blocks are each followed by attention, or by
      a mixer; between the two ways there is always one.
    mixing: mixers in place of attention, with a share for each stage, the same
      on both ways; None attends.
    mixer_mlp: hidden features of the MLP after each mixer over its channels; 0
      for none.
    head_dim: channels of a head of attention.
    groups: groups of the norms.
    learn_sigma: predict twice as many channels: noise, then variance values.
    num_classes: number of labels; 0 for no labels.
    label_dropout: rate at which a caller drops labels in training, see `DiT`.
    impl: attention implementation, see `ops.attention`.
    dtype: compute type of maps; parameters and conditioning are float32.
  """

  channels: int = 3
  width: int = 128
  multipliers: tuple[int, ...] = (1, 2, 3, 4)
  blocks: int = 2
  spatial: tuple[int, ...] = (1, 2, 3)
  mixing: Mixing | None = None
  mixer_mlp: float = 4.0
  head_dim: int = 32
  groups: int = 32
  learn_sigma: bool = False
  num_classes: int = 0
  label_dropout: float = 0.0
  impl: str = 'auto'
  dtype: Literal['float32', 'bfloat16', 'float16'] = 'float32'

  @nn.compact
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
      x: float [B, H, W, C].
      t: [B] times, embedded as they are.
      y: int32 [B] labels; None for the null label, or for no labels.
      drop: bool [B], True replaces the label by the null label.
      tau: not used: there are no hooks.
      keys: not used.

    Returns:
      float32 [B, H, W, out_channels].

    Raises:
      ValueError: x or t is of another shape, a field does not fit the others,
        or a null label is asked for that the model does not have.
    """
    del tau, keys
    self._check(x, t)
    c = self._condition(t, y, drop)
    h = self._conv(self.width, 'conv_in')(x.astype(self.dtype))
    skips, last = [h], len(self.multipliers) - 1
    for stage in range(last + 1):
      for i in range(self.blocks):
        h = self._block(h, c, stage, f'down_{stage}_{i}')
        skips.append(h)
      if stage < last:
        h = self._conv(h.shape[-1], f'shrink_{stage}', strides=2)(h)
        skips.append(h)
    h = self._residual(h, c, last, 'mid_0')
    h = self._mix(h, last, 'mid_mix')
    h = self._residual(h, c, last, 'mid_1')
    for stage in reversed(range(last + 1)):
      for i in range(self.blocks + 1):
        h = jnp.concatenate([h, skips.pop()], axis=-1)
        h = self._block(h, c, stage, f'up_{stage}_{i}')
      if stage:
        h = resize.repeat(h, 2)
        h = self._conv(h.shape[-1], f'grow_{stage}')(h)
    h = nn.silu(_norm(self.groups, self.dtype, 'norm_out')(h))
    h = self._conv(self.out_channels, 'conv_out', zero=True)(h)
    return h.astype(jnp.float32)

  def _check(self, x, t):
    factor = 2 ** (len(self.multipliers) - 1)
    if x.ndim != 4 or x.shape[-1] != self.channels:
      raise ValueError(
        f'expected images [B, H, W, {self.channels}], found shape {x.shape}; '
        'change `denoiser.channels` or `data`'
      )
    if x.shape[1] % factor or x.shape[2] % factor:
      raise ValueError(
        f'expected images whose sides {factor} divides, for '
        f'{len(self.multipliers)} stages (`denoiser.multipliers`), found '
        f'{x.shape[1]} x {x.shape[2]}'
      )
    if t.shape != x.shape[:1]:
      raise ValueError(f'expected times [{len(x)}], found shape {t.shape}')
    if self.width % self.groups:
      raise ValueError(
        f'expected a `denoiser.width` that {self.groups} groups divide '
        f'(`denoiser.groups`), found {self.width}'
      )
    stages = range(len(self.multipliers))
    if not set(self.spatial) <= set(stages):
      raise ValueError(
        f'expected `denoiser.spatial` in {list(stages)}, the stages of '
        f'`denoiser.multipliers`, found {self.spatial}'
      )
    if self.mixing is not None and len(self.mixing.shares) != len(stages):
      raise ValueError(
        f'expected `denoiser.mixing.shares` for each of {len(stages)} stages '
        f'(`denoiser.multipliers`), found {self.mixing.shares}'
      )

  def _condition(self, t, y, drop):
    """Return f32 [B, D], embedded time and label through a SiLU."""
    size = 4 * self.width
    c = adaln.TimeEmbed(size, self.width, name='t_embed')(t)
    if (rows := self.choose_labels(y, drop, len(t))) is not None:
      c = c + adaln.LabelEmbed(self.label_rows, size, name='y_embed')(rows)
    return nn.silu(c)

  def _block(self, h, c, stage, name):
    h = self._residual(h, c, stage, name)
    return self._mix(h, stage, f'{name}_mix') if stage in self.spatial else h

  def _residual(self, h, c, stage, name):
    width = self.width * self.multipliers[stage]
    return _Residual(width, self.groups, self.dtype, name=name)(h, c)

  def _mix(self, h, stage, name):
    shared: Any = dict(impl=self.impl, dtype=self.dtype, name=name)
    if self.mixing is None:
      return _SelfAttention(self.head_dim, self.groups, **shared)(h)
    mixer = self.mixing.mixer(stage)
    return MixerBlock(mixer, self.mixer_mlp, kernel_init=_TORCH, **shared)(h)

  def _conv(self, width, name, **kwargs):
    return _Conv(width, dtype=self.dtype, name=name, **kwargs)


class _Residual(nn.Module):
  """Add two convolutions of x, with the condition between them."""

  width: int
  groups: int
  dtype: str

  @nn.compact
  def __call__(self, x, c):
    h = nn.silu(_norm(self.groups, self.dtype, 'norm1')(x))
    h = _Conv(self.width, dtype=self.dtype, name='conv1')(h)
    shift = layers.Dense(self.width, kernel_init=_TORCH, name='condition')(c)
    h = h + shift[:, None, None].astype(h.dtype)
    h = nn.silu(_norm(self.groups, self.dtype, 'norm2')(h))
    h = _Conv(self.width, dtype=self.dtype, zero=True, name='conv2')(h)
    if x.shape[-1] != self.width:
      x = _Conv(self.width, size=1, dtype=self.dtype, name='shortcut')(x)
    return x + h


class _SelfAttention(nn.Module):
  """Add attention between all positions, zero at first."""

  head_dim: int
  groups: int
  impl: str
  dtype: str

  @nn.compact
  def __call__(self, x):
    b, *_, c = x.shape
    if c % self.head_dim:
      raise ValueError(
        f'expected channels that heads of {self.head_dim} divide '
        f'(`denoiser.head_dim`), found {c}; change `denoiser.width`'
      )
    h = _norm(self.groups, self.dtype, 'norm')(x).reshape(b, -1, c)
    heads = c // self.head_dim
    q, k, v = QKV(heads, True, self.dtype, _TORCH, name='qkv')(h)
    h = attention(q, k, v, impl=self.impl).reshape(x.shape)
    zeros = nn.initializers.zeros
    return x + layers.Dense(
      c, dtype=self.dtype, kernel_init=zeros, name='proj'
    )(h)


class _Conv(nn.Module):
  """Convolve with torch's padding and first values, or zeros."""

  width: int
  size: int = 3
  strides: int = 1
  zero: bool = False
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x):
    fan_in = self.size**2 * x.shape[-1]
    zeros = nn.initializers.zeros
    conv = nn.Conv(
      self.width,
      (self.size, self.size),
      strides=self.strides,
      padding=self.size // 2,
      dtype=self.dtype,
      kernel_init=zeros if self.zero else _TORCH,
      bias_init=zeros if self.zero else layers.uniform_fan_in(fan_in),
    )
    nn.share_scope(self, conv)
    return conv(x)


def _norm(groups, dtype, name):
  # The fast variance, E[x^2] - E[x]^2, cancels where the mean is large.
  return nn.GroupNorm(
    groups, epsilon=1e-5, use_fast_variance=False, dtype=dtype, name=name
  )
