"""Add small trainable layers beside the large ones of a trained network."""

import jax
from flax import linen as nn

from vfm_jax.nn import layers


class Adapter(nn.Module):
  """Squeeze, ReLU, widen: the adapter beside an MLP (AdaptFormer).

  arXiv:2205.13535, equations 1 and 2. It starts at zero, so that a network
  with it starts as what it was without.

  Attributes:
    width: features in between.
    scale: fixed factor of the output.
    dtype: compute type.
  """

  width: int
  scale: float = 0.1
  dtype: layers.Dtype = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Return what is to be added, [..., D] of x [..., D]."""
    start = layers.uniform_fan_in(x.shape[-1])
    down = layers.Dense(
      self.width, dtype=self.dtype, kernel_init=start, name='down'
    )
    up = layers.Dense(
      x.shape[-1],
      dtype=self.dtype,
      kernel_init=nn.initializers.zeros,
      name='up',
    )
    return self.scale * up(nn.relu(down(x)))
