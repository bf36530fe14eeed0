"""Divergence and likelihood of normal distributions, entry by entry."""

import math

import jax
import jax.numpy as jnp


def mean(x: jax.Array) -> jax.Array:
  """Average all but the first dimension."""
  return x.mean(tuple(range(1, x.ndim)))


def kl(
  mean: jax.Array,
  logvar: jax.Array,
  other_mean: jax.Array | float,
  other_logvar: jax.Array | float,
) -> jax.Array:
  """Return KL(N(mean, e^logvar) | N(other)) of each entry, in nats."""
  gap = logvar - other_logvar
  square = jnp.square(mean - other_mean) * jnp.exp(-other_logvar)
  return 0.5 * (jnp.exp(gap) - gap - 1.0 + square)


def log_pixels(
  x: jax.Array, mean: jax.Array, log_scale: jax.Array
) -> jax.Array:
  """Return the log-probability of the 8-bit value of each entry of x, in nats.

  Bins are 2/255 wide, the outermost ones open; the normal distribution
  function is its tanh approximation, and probabilities are at least 1e-12.
  """
  z, inverse = x - mean, jnp.exp(-log_scale)
  upper, lower = (_cdf(inverse * (z + d)) for d in (1 / 255, -1 / 255))
  upper = jnp.where(x > 0.999, 1.0, upper)
  lower = jnp.where(x < -0.999, 0.0, lower)
  return jnp.log(jnp.maximum(upper - lower, 1e-12))


def _cdf(x):
  cubic = x + 0.044715 * x**3
  return 0.5 * (1.0 + jnp.tanh(math.sqrt(2.0 / math.pi) * cubic))
