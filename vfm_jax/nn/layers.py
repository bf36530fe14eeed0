"""Provide the small layers and initialisers of vision transformers."""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from vfm_jax.ops import linear

Dtype = Any

Dense = functools.partial(nn.Dense, dot_general=linear.dot_general)

Gelu = Literal['erf', 'tanh', 'quick']


def xavier_uniform() -> nn.initializers.Initializer:
  """Return the initialiser of Linear layers in pretraining (VideoMAE)."""
  return nn.initializers.xavier_uniform()


def trunc_normal(std: float, bound: float) -> nn.initializers.Initializer:
  """Return a normal initialiser cut off at absolute bounds +-bound.

  Args:
    std: standard deviation before truncation; it is not corrected for it.
    bound: largest absolute value.
  """

  def init(key, shape, dtype=jnp.float32):
    cut = bound / std
    return std * jax.random.truncated_normal(key, -cut, cut, shape, dtype)

  return init


def uniform_fan_in(fan_in: int) -> nn.initializers.Initializer:
  """Return U(+-1/sqrt(fan_in)), the default of torch's Linear and Conv."""
  limit = 1 / math.sqrt(fan_in)

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -limit, limit)

  return init


def drop_path(
  x: jax.Array, rate: float | jax.Array, keys: jax.Array
) -> jax.Array:
  """Zero a residual branch for some examples (stochastic depth).

  Args:
    x: [B, N, D] output of the branch.
    rate: probability to drop it; what is kept is scaled by 1 / (1 - rate).
    keys: one key an example, [B].
  """
  keep = 1.0 - rate
  kept = jax.vmap(lambda key: jax.random.bernoulli(key, keep))(keys)
  return x * (kept / keep).astype(x.dtype)[:, None, None]


def unit(x: jax.Array) -> jax.Array:
  """Return x [..., D] at unit length, in float32."""
  x = x.astype(jnp.float32)
  square = jnp.square(x).sum(-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


class LayerNorm(nn.Module):
  """Normalise the last axis in float32.

  Attributes:
    eps: added to the variance.
    dtype: type of the output.
    affine: learn a scale and a bias of each feature.
  """

  eps: float = 1e-6
  dtype: Dtype = 'float32'
  affine: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Return the normalised x [..., D]."""
    dim = x.shape[-1]
    x = x.astype(jnp.float32)
    # Two passes: the variance as a difference of squares loses digits.
    x = x - x.mean(-1, keepdims=True)
    variance = jnp.square(x).mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(variance + self.eps)
    if self.affine:
      scale = self.param('scale', nn.initializers.ones, (dim,))
      bias = self.param('bias', nn.initializers.zeros, (dim,))
      x = x * scale + bias
    return x.astype(self.dtype)


class PatchEmbed(nn.Module):
  """Project patches: a convolution whose kernel equals its stride.

  It takes patches that are already cut out, so that hidden ones cost nothing.

  Attributes:
    width: features of a token.
    dtype: compute type.
    init_scheme: 'fan_in' draws kernel and bias from U(+-1/sqrt(features)), as
      torch's Conv does; 'xavier' draws the kernel by Xavier uniform, as a
      matrix, and starts from a zero bias; so does 'normal', which draws it
      with a standard deviation of 0.02.
  """

  width: int
  dtype: Dtype = 'float32'
  init_scheme: Literal['fan_in', 'xavier', 'normal'] = 'fan_in'

  @nn.compact
  def __call__(self, patches: jax.Array) -> jax.Array:
    """Return tokens [B, N, width] of patches [B, N, p0*p1*p2*C]."""
    kernel_init, bias_init = {
      'fan_in': (uniform_fan_in(patches.shape[-1]),) * 2,
      'xavier': (xavier_uniform(), nn.initializers.zeros),
      'normal': (trunc_normal(0.02, 2.0), nn.initializers.zeros),
    }[self.init_scheme]
    kernel = self.param('kernel', kernel_init, (patches.shape[-1], self.width))
    bias = self.param('bias', bias_init, (self.width,))
    kernel, bias = kernel.astype(self.dtype), bias.astype(self.dtype)
    return linear.matmul(patches.astype(self.dtype), kernel) + bias


class Mlp(nn.Module):
  """Apply fc1, GELU and fc2.

  Attributes:
    width: features of the hidden layer.
    dtype: compute type.
    kernel_init: initialiser of both kernels.
    gelu: the exact one, by 'erf', or its approximation by 'tanh', or 'quick',
      x sigmoid(1.702 x) (CLIP).
    out_init: initialiser of the second kernel; None for `kernel_init`.
  """

  width: int
  dtype: Dtype = 'float32'
  kernel_init: nn.initializers.Initializer = xavier_uniform()
  gelu: Gelu = 'erf'
  out_init: nn.initializers.Initializer | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Return [..., D] of x [..., D]."""
    shared = dict(dtype=self.dtype, kernel_init=self.kernel_init)
    h = Dense(self.width, name='fc1', **shared)(x)
    if self.gelu == 'quick':
      h = h * jax.nn.sigmoid(1.702 * h)
    else:
      h = jax.nn.gelu(h, approximate=self.gelu == 'tanh')
    if self.out_init is not None:
      shared['kernel_init'] = self.out_init
    return Dense(x.shape[-1], name='fc2', **shared)(h)


class GatedMlp(nn.Module):
  """Apply fc3(SiLU(fc1 x) * fc2 x) (SwiGLU, arXiv:2002.05202), with biases.

  Attributes:
    width: features of both hidden layers.
    dtype: compute type.
    kernel_init: initialiser of the three kernels.
  """

  width: int
  dtype: Dtype = 'float32'
  kernel_init: nn.initializers.Initializer = xavier_uniform()

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Return [..., D] of x [..., D]."""
    shared = dict(dtype=self.dtype, kernel_init=self.kernel_init)
    gate = jax.nn.silu(Dense(self.width, name='fc1', **shared)(x))
    value = Dense(self.width, name='fc2', **shared)(x)
    return Dense(x.shape[-1], name='fc3', **shared)(gate * value)
