"""Give image features by the Inception-v3 that FID is defined with.

It is the network of December 2015 (arXiv:1512.00567), with 1,008 outputs and
a few blocks of its own: average pools that leave padding out of the mean, and
a max pool in the last block. That much, and the names of the layers, follow
the port of pytorch-fid; which activations are read follows the evaluator of
ADM (arXiv:2105.05233).
"""

from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vfm_jax.nn.conv import ConvNorm

SIZE, OUTPUTS = 299, 1008
# The evaluator of ADM reads this many channels, 17 x 17 positions each.
SPATIAL_CHANNELS = 7


class Activations(NamedTuple):
  """Hold what metrics read.

  Attributes:
    pool: f32 [B, 2048] means of the last feature maps, for FID.
    spatial: f32 [B, 2023] the first 7 channels of the first branch of
      Mixed_6d (in TensorFlow `mixed_6/conv`), positions first, for sFID.
    logits: f32 [B, 1008] without a bias, as the evaluator has them.
  """

  pool: jax.Array
  spatial: jax.Array
  logits: jax.Array


class InceptionV3(nn.Module):
  """Turn images into activations."""

  @nn.compact
  def __call__(self, x: jax.Array) -> Activations:
    """Return the activations of x f32 [B, 299, 299, 3] in [-1, 1]."""
    x = _conv('Conv2d_1a_3x3', 32, 3, stride=2)(x)
    x = _conv('Conv2d_2a_3x3', 32, 3, padding='VALID')(x)
    x = _conv('Conv2d_2b_3x3', 64, 3)(x)
    x = _max_pool(x)
    x = _conv('Conv2d_3b_1x1', 80, 1)(x)
    x = _conv('Conv2d_4a_3x3', 192, 3, padding='VALID')(x)
    x = _max_pool(x)
    x = BlockA(32, name='Mixed_5b')(x)
    x = BlockA(64, name='Mixed_5c')(x)
    x = BlockA(64, name='Mixed_5d')(x)
    x = BlockB(name='Mixed_6a')(x)
    x = BlockC(128, name='Mixed_6b')(x)
    x = BlockC(160, name='Mixed_6c')(x)
    x = BlockC(160, name='Mixed_6d')(x)
    # The first branch comes first among the channels.
    spatial = x[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
    x = BlockC(192, name='Mixed_6e')(x)
    x = BlockD(name='Mixed_7a')(x)
    x = BlockE('mean', name='Mixed_7b')(x)
    x = BlockE('max', name='Mixed_7c')(x)
    pool = x.mean((1, 2))
    logits = nn.Dense(
      OUTPUTS,
      use_bias=False,
      precision=jax.lax.Precision.HIGHEST,
      name='fc',
    )(pool)
    return Activations(pool, spatial, logits)


class BlockA(nn.Module):
  """Mix kernels of 1, 3 and 5 at 35 x 35.

  Attributes:
    pooled: channels of the pooled branch.
  """

  pooled: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Return f32 [B, 35, 35, 224 + pooled]."""
    return _join(
      _conv('branch1x1', 64, 1)(x),
      _chain(x, ('branch5x5_1', 48, 1), ('branch5x5_2', 64, 5)),
      _chain(
        x,
        ('branch3x3dbl_1', 64, 1),
        ('branch3x3dbl_2', 96, 3),
        ('branch3x3dbl_3', 96, 3),
      ),
      _conv('branch_pool', self.pooled, 1)(_mean_pool(x)),
    )


class BlockB(nn.Module):
  """Shrink to 17 x 17."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Return f32 [B, 17, 17, C + 480]."""
    y = _chain(x, ('branch3x3dbl_1', 64, 1), ('branch3x3dbl_2', 96, 3))
    return _join(
      _conv('branch3x3', 384, 3, stride=2)(x),
      _conv('branch3x3dbl_3', 96, 3, stride=2)(y),
      _max_pool(x),
    )


class BlockC(nn.Module):
  """Mix rows and columns of 7 at 17 x 17.

  Attributes:
    width: channels inside the branches.
  """

  width: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Return f32 [B, 17, 17, 768]."""
    w, row, column = self.width, (1, 7), (7, 1)
    return _join(
      _conv('branch1x1', 192, 1)(x),
      _chain(
        x,
        ('branch7x7_1', w, 1),
        ('branch7x7_2', w, row),
        ('branch7x7_3', 192, column),
      ),
      _chain(
        x,
        ('branch7x7dbl_1', w, 1),
        ('branch7x7dbl_2', w, column),
        ('branch7x7dbl_3', w, row),
        ('branch7x7dbl_4', w, column),
        ('branch7x7dbl_5', 192, row),
      ),
      _conv('branch_pool', 192, 1)(_mean_pool(x)),
    )


class BlockD(nn.Module):
  """Shrink to 8 x 8."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Return f32 [B, 8, 8, C + 512]."""
    y = _conv('branch3x3_1', 192, 1)(x)
    z = _chain(
      x,
      ('branch7x7x3_1', 192, 1),
      ('branch7x7x3_2', 192, (1, 7)),
      ('branch7x7x3_3', 192, (7, 1)),
    )
    return _join(
      _conv('branch3x3_2', 320, 3, stride=2)(y),
      _conv('branch7x7x3_4', 192, 3, stride=2)(z),
      _max_pool(x),
    )


class BlockE(nn.Module):
  """Mix rows and columns of 3 at 8 x 8.

  Attributes:
    pool: how the pooled branch pools; `max` in the last block of this network
      alone.
  """

  pool: Literal['mean', 'max']

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Return f32 [B, 8, 8, 2048]."""
    y = _conv('branch3x3_1', 384, 1)(x)
    z = _chain(x, ('branch3x3dbl_1', 448, 1), ('branch3x3dbl_2', 384, 3))
    if self.pool == 'mean':
      pooled = _mean_pool(x)
    else:
      pooled = nn.max_pool(x, (3, 3), padding='SAME')
    return _join(
      _conv('branch1x1', 320, 1)(x),
      _conv('branch3x3_2a', 384, (1, 3))(y),
      _conv('branch3x3_2b', 384, (3, 1))(y),
      _conv('branch3x3dbl_3a', 384, (1, 3))(z),
      _conv('branch3x3dbl_3b', 384, (3, 1))(z),
      _conv('branch_pool', 192, 1)(pooled),
    )


def _conv(name, width, kernel, *, stride=1, padding=None):
  """Return a layer; with a stride it takes no padding unless told."""
  if isinstance(kernel, int):
    kernel = (kernel, kernel)
  padding = padding or ('SAME' if stride == 1 else 'VALID')
  return ConvNorm(width, kernel, stride, padding, name=name)


def _chain(x, *layers):
  for name, width, kernel in layers:
    x = _conv(name, width, kernel)(x)
  return x


def _join(*branches):
  return jnp.concatenate(branches, axis=-1)


def _max_pool(x):
  return nn.max_pool(x, (3, 3), (2, 2))


def _mean_pool(x):
  return nn.avg_pool(x, (3, 3), padding='SAME', count_include_pad=False)
