"""Steer a denoiser with the labels that it was trained with."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from vfm_jax.ops.process import bcast


def cfg(
  denoise: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
  y: jax.Array,
  scale: float | jax.Array,
  null_label: int,
  *,
  channels: int | None = None,
  interval: tuple[float, float] | None = None,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """Guide without a classifier: null + scale (conditional - null).

  Both outputs come from one call with a batch of twice the size
  (arXiv:2207.12598, eq. 6). Variance channels stay those of the conditional
  output.

  Args:
    denoise: (x, t, y) -> output.
    y: int32 [B] labels.
    scale: 1 is the conditional output.
    null_label: the label that stands for none.
    channels: how many leading channels of the output are guided; None guides
      all channels of x. The released DiT and SiT guide 3 of 4.
    interval: (lowest, highest) t at which to guide, both included, in the units
      of the process (arXiv:2404.07724); elsewhere the output is conditional.
  """

  def guided(x: jax.Array, t: jax.Array) -> jax.Array:
    labels = jnp.concatenate([y, jnp.full_like(y, null_label)])
    x_twice, t_twice = (jnp.concatenate([z, z]) for z in (x, t))
    output, null = jnp.split(denoise(x_twice, t_twice, labels), 2)
    count = x.shape[-1] if channels is None else channels
    moved = null + scale * (output - null)
    if interval is not None:
      inside = (t >= interval[0]) & (t <= interval[1])
      moved = jnp.where(bcast(inside, x), moved, output)
    return jnp.concatenate([moved[..., :count], output[..., count:]], -1)

  return guided
