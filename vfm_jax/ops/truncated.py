"""Cut densities to a range, by their inverse distribution functions."""

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr, ndtri


def uniform(u: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
  """Move u ~ U[0, 1) to U[low, high); from 0 to 1 it stays what it is."""
  return low + u * (high - low)


def normal(z: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
  """Move z ~ N(0, 1) to what N(0, 1) is between `low` and `high`.

  Phi^-1(Phi(low) + Phi(z) (Phi(high) - Phi(low))), so that the order is kept.
  A range that has no mass in float32 gives its end next to 0.

  Args:
    z: f32 [B].
    low: f32 [B], -inf for no end.
    high: f32 [B], inf for no end.
  """
  # Small probabilities keep their digits, those close to 1 do not: ranges on
  # the right are mirrored.
  flip = low + high > 0
  a, b = jnp.where(flip, -high, low), jnp.where(flip, -low, high)
  first, last = ndtr(a), ndtr(b)
  share = ndtr(jnp.where(flip, -z, z))
  moved = ndtri(first + share * (last - first))
  moved = jnp.clip(jnp.where(jnp.isfinite(moved), moved, b), a, b)
  return jnp.where(flip, -moved, moved)
