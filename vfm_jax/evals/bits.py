"""Bound the likelihood of images under Gaussian diffusion."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vfm_jax import samplers
from vfm_jax.ops import likelihood
from vfm_jax.ops.diffusion import Gaussian, Restrict


class Bits(NamedTuple):
  """Hold a variational bound in bits a dimension, noisiest step first.

  Attributes:
    total: f32 [B] the bound: the sum of the two below.
    prior: f32 [B] term of the noisiest marginal against the normal.
    bound: f32 [B, T] terms of the steps.
    x0_mse: f32 [B, T] squared error of the predicted x0.
    eps_mse: f32 [B, T] squared error of the noise that it implies.
  """

  total: jax.Array
  prior: jax.Array
  bound: jax.Array
  x0_mse: jax.Array
  eps_mse: jax.Array


def bits_per_dim(
  denoise: samplers.Denoise,
  process: Gaussian,
  x0: jax.Array,
  keys: jax.Array | None = None,
  *,
  steps: str = '',
  restrict: Restrict | None = None,
  noise: jax.Array | None = None,
) -> Bits:
  """Return the bound on the likelihood of x0, f32 [B, ..., C] in [-1, 1].

  Args:
    denoise: as in `samplers.ddpm`.
    process: with a learned or fixed variance.
    x0: f32 [B, ..., C] 8-bit pixels, scaled to [-1, 1].
    keys: one key a sample [B].
    steps: which steps to take; not all of them bounds a coarser process.
    restrict: what is done to each predicted x0.
    noise: [T, B, ..., C] in place of draws from the keys.
  """
  process = process.respaced(steps)
  count = process.num_kept
  if noise is not None and len(noise) != count:
    raise ValueError(
      f'expected `noise` for each of the {count} steps, found {len(noise)}'
    )

  def error(a, b):
    return likelihood.mean(jnp.square(a - b))

  def body(carry, inputs):
    j, z = inputs
    if z is None:
      z = samplers.stream(keys, j + 1, x0.shape[1:])
    t = jnp.full(x0.shape[:1], j, jnp.int32)
    x = process.corrupt(x0, z, t)
    output = denoise(x, process.original(t))
    p = process.predict(output, x, t, restrict=restrict)
    bound = process.bound(output, x0, x, t, restrict=restrict)
    return carry, (bound, error(p.x0, x0), error(p.eps, z))

  order = jnp.arange(count, dtype=jnp.int32)[::-1]
  _, terms = jax.lax.scan(body, None, (order, noise))
  bound, x0_mse, eps_mse = (x.T for x in terms)
  prior = process.prior_bound(x0)
  return Bits(bound.sum(1) + prior, prior, bound, x0_mse, eps_mse)
