"""Build the autoencoder whose latents diffusion models learn.

The KL-regularised convolutional autoencoder of latent diffusion
(arXiv:2112.10752, section 3.1 and appendix G) at the sizes of Stable Diffusion:
a picture of H x W pixels becomes H/8 x W/8 positions of 4 channels.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from vfm_jax.ops import resize
from vfm_jax.ops.attention import attention


class Moments(NamedTuple):
  """Hold the normal distribution of a latent, f32 [B, h, w, C] each.

  Attributes:
    mean: its mean.
    logvar: logarithm of its variance, within [-30, 20].
  """

  mean: jax.Array
  logvar: jax.Array

  @property
  def std(self) -> jax.Array:
    """Return the standard deviation."""
    return jnp.exp(0.5 * self.logvar)


class AutoencoderKL(nn.Module):
  """Encode pictures as latents and decode them.

  Attributes:
    widths: channels of each resolution, the finest first; each but the last
      halves it.
    layers: residual blocks of a resolution in the encoder; the decoder has one
      more.
    groups: groups of the norms.
    channels: of the pictures.
    latent_channels: of the latents.
    mid_attention: attend at the coarsest resolution, with one head.
    quant: whether a 1x1 convolution follows the encoder.
    post_quant: whether one precedes the decoder.
    scaling: a diffusion model learns (latent - shift) * scaling.
    shift: see `scaling`.
    impl: attention implementation, see `ops.attention`.
    dtype: compute type; parameters, moments, pictures and the statistics of
      the norms are float32.
  """

  widths: tuple[int, ...] = (128, 256, 512, 512)
  layers: int = 2
  groups: int = 32
  channels: int = 3
  latent_channels: int = 4
  mid_attention: bool = True
  quant: bool = True
  post_quant: bool = True
  scaling: float = 0.18215
  shift: float = 0.0
  impl: str = 'auto'
  dtype: Literal['float32', 'bfloat16', 'float16'] = 'float32'

  @property
  def factor(self) -> int:
    """Return how many pixels high and wide a latent position is."""
    return 2 ** (len(self.widths) - 1)

  def template(self) -> Any:
    """Return the shapes of the parameters."""
    side = self.factor
    x = jax.ShapeDtypeStruct((1, side, side, self.channels), jnp.float32)
    return jax.eval_shape(self.init, jax.random.key(0), x)['params']

  def setup(self):
    """Make the submodules (called by Flax)."""
    if bad := [w for w in self.widths if w % self.groups]:
      raise ValueError(
        f'expected `vae.widths` that {self.groups} groups divide '
        f'(`vae.groups`), found {bad}'
      )
    shared: Any = dict(
      widths=self.widths,
      groups=self.groups,
      attend=self.mid_attention,
      impl=self.impl,
      dtype=self.dtype,
    )
    moments = 2 * self.latent_channels
    self.encoder = _Encoder(layers=self.layers, out=moments, **shared)
    self.decoder = _Decoder(layers=self.layers + 1, out=self.channels, **shared)
    if self.quant:
      self.quant_conv = _conv(moments, 1, self.dtype)
    if self.post_quant:
      self.post_quant_conv = _conv(self.latent_channels, 1, self.dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return pictures encoded by their means and decoded, as `decode` does."""
    return self.decode(self.encode(x).mean)

  def encode(self, x: jax.Array) -> Moments:
    """Return the distribution of the latents of pictures.

    Args:
      x: float [B, H, W, channels] in [-1, 1].

    Raises:
      ValueError: another number of channels, or a size that `factor` does not
        divide.
    """
    height, width, channels = x.shape[1:]
    if channels != self.channels or height % self.factor or width % self.factor:
      raise ValueError(
        f'expected pictures [B, H, W, {self.channels}] with H and W multiples '
        f'of {self.factor}, found {tuple(x.shape)}; change the transform of '
        'the pipeline'
      )
    h = self.encoder(x.astype(self.dtype))
    h = (self.quant_conv(h) if self.quant else h).astype(jnp.float32)
    mean, logvar = jnp.split(h, 2, axis=-1)
    return Moments(mean, jnp.clip(logvar, -30.0, 20.0))

  def decode(self, z: jax.Array) -> jax.Array:
    """Return pictures f32 [B, H, W, channels], about in [-1, 1].

    Args:
      z: float [B, h, w, latent_channels], as encoded, not scaled.

    Raises:
      ValueError: another number of channels.
    """
    if z.ndim != 4 or z.shape[-1] != self.latent_channels:
      raise ValueError(
        f'expected latents [B, h, w, {self.latent_channels}], found '
        f'{tuple(z.shape)}; take the autoencoder that they were made with'
      )
    z = z.astype(self.dtype)
    z = self.post_quant_conv(z) if self.post_quant else z
    return self.decoder(z).astype(jnp.float32)


class _Encoder(nn.Module):
  widths: tuple[int, ...]
  layers: int
  out: int
  groups: int
  attend: bool
  impl: str
  dtype: str

  @nn.compact
  def __call__(self, x):
    conv = lambda width, name: _conv(width, 3, self.dtype, name=name)  # noqa: E731
    h = conv(self.widths[0], 'conv_in')(x)
    for i, width in enumerate(self.widths):
      for j in range(self.layers):
        h = _Residual(width, self.groups, self.dtype, name=f'down_{i}_{j}')(h)
      if i < len(self.widths) - 1:
        # One row and one column of zeros, after the last ones only.
        h = jnp.pad(h, ((0, 0), (0, 1), (0, 1), (0, 0)))
        h = _conv(
          width, 3, self.dtype, strides=2, padding='VALID', name=f'shrink_{i}'
        )(h)
    h = _Middle(self.groups, self.attend, self.impl, self.dtype, name='mid')(h)
    h = nn.silu(_norm(self.groups, self.dtype, name='norm_out')(h))
    return conv(self.out, 'conv_out')(h)


class _Decoder(nn.Module):
  widths: tuple[int, ...]
  layers: int
  out: int
  groups: int
  attend: bool
  impl: str
  dtype: str

  @nn.compact
  def __call__(self, z):
    conv = lambda width, name: _conv(width, 3, self.dtype, name=name)  # noqa: E731
    h = conv(self.widths[-1], 'conv_in')(z)
    h = _Middle(self.groups, self.attend, self.impl, self.dtype, name='mid')(h)
    for i, width in enumerate(reversed(self.widths)):
      for j in range(self.layers):
        h = _Residual(width, self.groups, self.dtype, name=f'up_{i}_{j}')(h)
      if i < len(self.widths) - 1:
        h = conv(width, f'grow_{i}')(resize.repeat(h, 2))
    h = nn.silu(_norm(self.groups, self.dtype, name='norm_out')(h))
    return conv(self.out, 'conv_out')(h)


class _Middle(nn.Module):
  groups: int
  attend: bool
  impl: str
  dtype: str

  @nn.compact
  def __call__(self, x):
    width = x.shape[-1]
    x = _Residual(width, self.groups, self.dtype, name='res_0')(x)
    if self.attend:
      x = _Attention(self.groups, self.impl, self.dtype, name='attn')(x)
    return _Residual(width, self.groups, self.dtype, name='res_1')(x)


class _Residual(nn.Module):
  width: int
  groups: int
  dtype: str

  @nn.compact
  def __call__(self, x):
    h = nn.silu(_norm(self.groups, self.dtype, name='norm1')(x))
    h = _conv(self.width, 3, self.dtype, name='conv1')(h)
    h = nn.silu(_norm(self.groups, self.dtype, name='norm2')(h))
    h = _conv(self.width, 3, self.dtype, name='conv2')(h)
    if x.shape[-1] != self.width:
      x = _conv(self.width, 1, self.dtype, name='shortcut')(x)
    return x + h


class _Attention(nn.Module):
  groups: int
  impl: str
  dtype: str

  @nn.compact
  def __call__(self, x):
    b, height, width, c = x.shape
    h = _norm(self.groups, self.dtype, name='norm')(x)
    h = h.reshape(b, height * width, c)
    q, k, v = (
      nn.Dense(c, dtype=self.dtype, name=name)(h)[:, :, None]
      for name in ('q', 'k', 'v')
    )
    h = attention(q, k, v, impl=self.impl)[:, :, 0]
    h = nn.Dense(c, dtype=self.dtype, name='proj')(h)
    return x + h.reshape(x.shape)


def _conv(
  features: int,
  size: int,
  dtype: str,
  *,
  strides: int = 1,
  padding: str = 'SAME',
  name: str | None = None,
) -> nn.Conv:
  return nn.Conv(
    features,
    (size, size),
    strides=strides,
    padding=padding,
    dtype=dtype,
    name=name,
  )


def _norm(groups: int, dtype: str, *, name: str) -> nn.GroupNorm:
  # The fast variance, E[x^2] - E[x]^2, cancels where the mean is large.
  return nn.GroupNorm(
    groups, epsilon=1e-6, use_fast_variance=False, dtype=dtype, name=name
  )
