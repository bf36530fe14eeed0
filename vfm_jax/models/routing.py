"""Route each noise level through its own channels (DTR).

Park et al. 2023 (arXiv:2310.07138). A routing is the `mask` of
`nn.adaln.Hooks`,

    DiT(..., hooks=Hooks(mask=Routing()))

and adds no parameters. Guide all channels (`sampling.channels` None) to sample
as the released code does.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from vfm_jax.nn.adaln import Context
from vfm_jax.ops import routing
from vfm_jax.ops.process import NOISE_LEVELS


@runtime_checkable
class Routes(Protocol):
  """Tell which channels serve which noise level, for reports and checks."""

  def table(self, channels: int, layer: int) -> np.ndarray:
    """Return the masks bool [NOISE_LEVELS, channels] of a block."""
    ...


@dataclasses.dataclass(frozen=True)
class Routing:
  """Mask a block's input by a window that slides with the noise level.

  All blocks have the same window, see `ops.routing.starts`.

  Attributes:
    alpha: above 1 the window moves slowly at low noise.
    beta: share of the channels that are active; 1 is no mask.
  """

  alpha: float = 4.0
  beta: float = 0.8

  def __call__(
    self, layer: int | jax.Array, x: jax.Array, context: Context
  ) -> jax.Array | None:
    """Return the masks [B, 1, D] of x [B, N, D], 0 or 1; None for no mask.

    Raises:
      ValueError: the network was not told the noise level.
    """
    del layer
    tau, channels = level_of(context), x.shape[-1]
    width = routing.width_of(channels, self.beta)
    if width == channels:
      return None
    mask = routing.select_window(tau, channels, width, alpha=self.alpha)
    return mask[:, None].astype(x.dtype)

  def table(self, channels: int, layer: int) -> np.ndarray:
    """Return the masks bool [NOISE_LEVELS, channels]."""
    del layer
    width = routing.width_of(channels, self.beta)
    return routing.sliding_window(channels, width, alpha=self.alpha)


@dataclasses.dataclass(frozen=True)
class RandomRouting:
  """Mask a block's input by random channels, others in each block and level.

  Attributes:
    beta: share of the channels that are active.
    seed: of the masks.
  """

  beta: float = 0.8
  seed: int = 0

  def __call__(
    self, layer: int | jax.Array, x: jax.Array, context: Context
  ) -> jax.Array:
    """Return the masks [B, 1, D] of x [B, N, D], 0 or 1.

    Raises:
      ValueError: the network was not told the noise level.
    """
    mask = self._select(level_of(context), x.shape[-1], layer)
    return mask[:, None].astype(x.dtype)

  def table(self, channels: int, layer: int) -> np.ndarray:
    """Return the masks bool [NOISE_LEVELS, channels] of a block."""
    select = jax.jit(self._select, static_argnums=1)
    return np.asarray(select(jnp.arange(NOISE_LEVELS), channels, layer))

  def _select(self, tau, channels, layer):
    width = routing.width_of(channels, self.beta)
    return routing.select_random(
      tau, channels, width, layer=layer, seed=self.seed
    )


def level_of(context: Context) -> jax.Array:
  """Return the noise level int32 [B].

  Raises:
    ValueError: there is none.
  """
  if context.tau is None:
    raise ValueError(
      '`denoiser.hooks` route by the noise level: expected tau int32 [B], '
      'found None; call the network with tau=process.noise_index(t)'
    )
  return context.tau
