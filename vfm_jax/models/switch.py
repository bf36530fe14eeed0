"""Route noise levels through mixtures of experts (Switch-DiT).

Park et al. 2024 (arXiv:2403.09176), section 4: as DTR, but each block learns
its mask, from experts that a gate picks by the noise level alone. The released
code, which this follows, has affine experts and the mask 1 + mixture; experts
of zero, as at first, leave a DiT as it is.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from vfm_jax.models.routing import level_of
from vfm_jax.nn import adaln, layers
from vfm_jax.ops import moe
from vfm_jax.ops.process import NOISE_LEVELS

# What the embeddings of noise levels are called in `Context.shared`.
SHARED = 'switch'
# What is sown of each layer.
GATES, LEVELS, TOP = 'switch_gates', 'switch_levels', 'switch_top'


def switch(
  experts: int = 3, *, top_k: int = 2, impl: moe.Impl = 'auto'
) -> adaln.Hooks:
  """Return the hooks of a Switch-DiT.

  Further parameters of each block are mask_hook/gate/{kernel [D, E], bias [E]}
  and mask_hook/experts/{kernel [E, D, D], bias [E, D]}. Train with the
  auxiliary loss `objectives.prior.DiffusionPrior`.

  Args:
    experts: number of experts E of a block.
    top_k: how many of them a noise level uses.
    impl: how they are computed, see `ops.moe.mix`.

  Raises:
    ValueError: `top_k` is not from 1 to E.
  """
  if not 1 <= top_k <= experts:
    raise ValueError(
      'expected `denoiser.hooks.top_k` from 1 to `denoiser.hooks.experts`, '
      f'{experts}, found {top_k}'
    )
  return adaln.Hooks(mask=Experts(experts, top_k, impl), prepare=LevelEmbeds())


class Embeds(flax.struct.PyTreeNode):
  """Hold what the gates of all layers read.

  Attributes:
    batch: f32 [B, D], SiLU of the embedded noise level of each example.
    levels: f32 [NOISE_LEVELS, D], the same of all levels, without a gradient;
      None unless the values of gates are collected.
    alike: bool [], whether all examples are at one level, as a sampler has
      them; None in training, where they are not.
  """

  batch: jax.Array
  levels: jax.Array | None = None
  alike: jax.Array | None = None


class LevelEmbeds(nn.Module):
  """Embed noise levels as times; a `Hooks.prepare` without parameters.

  The time embedding is given the noise level 0 to 999, whatever the process:
  for Gaussian diffusion of 1,000 steps, as released, it is the time itself.
  """

  @nn.compact
  def __call__(
    self,
    context: adaln.Context,
    embed_time: Callable[[jax.Array], jax.Array],
  ) -> dict[str, Any]:
    """Return `Embeds` under 'switch'.

    Raises:
      ValueError: the network was not told the noise level.
    """
    tau = level_of(context)
    batch = jax.nn.silu(embed_time(tau.astype(jnp.float32)))
    alike = None if context.keys is not None else (tau == tau[0]).all()
    levels = None
    if self.is_mutable_collection('aux'):
      every = jnp.arange(NOISE_LEVELS, dtype=jnp.float32)
      levels = jax.lax.stop_gradient(jax.nn.silu(embed_time(every)))
    return {SHARED: Embeds(batch, levels, alike)}


class Experts(nn.Module):
  """Make the mask 1 + sum_k p_k (x W_k + b_k); a `Hooks.mask`.

  p is a softmax over all experts, of which the largest are kept as they are:
  they do not add up to 1. It depends on the noise level alone. Sown into
  'aux': `switch_gates` f32 [B, E], p of the examples; and, without a gradient,
  `switch_levels` f32 [NOISE_LEVELS, E], p of all levels, and `switch_top` int32
  [NOISE_LEVELS, k], the experts of a level, the largest first.

  Attributes:
    count: number of experts E.
    top_k: how many of them a level uses.
    impl: see `ops.moe.mix`.
  """

  count: int = 3
  top_k: int = 2
  impl: moe.Impl = 'auto'

  @nn.compact
  def __call__(
    self, layer: int | jax.Array, x: jax.Array, context: adaln.Context
  ) -> jax.Array:
    """Return the mask [B, N, D] of x [B, N, D]."""
    del layer
    embeds = context.prepared(SHARED)
    gate = layers.Dense(
      self.count, kernel_init=layers.xavier_uniform(), name='gate'
    )
    p = jax.nn.softmax(adaln.by_rows(gate(embeds.batch)))
    _, chosen = jax.lax.top_k(p, self.top_k)
    used = p * jax.nn.one_hot(chosen, self.count).sum(-2)
    if embeds.levels is not None:
      levels = adaln.by_rows(gate(embeds.levels))
      levels = jax.lax.stop_gradient(jax.nn.softmax(levels))
      self.sow('aux', GATES, p)
      self.sow('aux', LEVELS, levels)
      self.sow('aux', TOP, jax.lax.top_k(levels, self.top_k)[1])
    kernel, bias = _Affine(self.count, name='experts')(x.shape[-1])
    return 1 + moe.mix(
      x,
      kernel,
      bias,
      used,
      top_k=self.top_k,
      impl=self.impl,
      alike=embeds.alike,
    )


class _Affine(nn.Module):
  """Hold the parameters of the experts, zero at first."""

  count: int

  @nn.compact
  def __call__(self, width: int) -> tuple[jax.Array, jax.Array]:
    zeros = nn.initializers.zeros
    kernel = self.param('kernel', zeros, (self.count, width, width))
    return kernel, self.param('bias', zeros, (self.count, width))
