"""Weigh tasks against each other, from their losses or their gradients.

The formulas behind `vfm_jax.multitask`; all arrays are float32, K tasks.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

PyTree = Any


def uncertainty_terms(losses: jax.Array, s: jax.Array) -> jax.Array:
  """Return (exp(-s) L + s) / 2 of losses [K] and log-variances [K]."""
  return uncertainty_weights(s) * losses + 0.5 * s


def uncertainty_weights(s: jax.Array) -> jax.Array:
  """Return what log-variances [K] multiply the losses by, exp(-s) / 2."""
  return 0.5 * jnp.exp(-s)


def gram(grads: PyTree) -> jax.Array:
  """Return the products f32 [K, K] of gradients, a tree of [K, ...]."""

  def products(g):
    g = g.astype(jnp.float32)
    axes = tuple(range(1, g.ndim))
    return jnp.tensordot(g, g, (axes, axes), precision='highest')

  return sum(map(products, jax.tree.leaves(grads)), start=jnp.float32(0.0))


def mix(weights: jax.Array, grads: PyTree) -> PyTree:
  """Return sum_k weights_k grads_k for a tree of [K, ...]."""
  return jax.tree.map(
    lambda g: jnp.tensordot(weights.astype(g.dtype), g, 1, precision='highest'),
    grads,
  )


def projected(
  products: jax.Array,
  order: jax.Array,
  against: Literal['others', 'all'] = 'others',
) -> jax.Array:
  """Return weights [K]: the sum of projected gradients is sum_k w_k g_k.

  A projected gradient is a sum of the tasks' gradients, so that all is worked
  out in its K coefficients.

  Args:
    products: f32 [K, K], see `gram`.
    order: int32 [K, K], in row i the order of the tasks that the gradient of
      task i is projected on.
    against: see `multitask.PCGrad`.
  """
  rows = jnp.eye(len(products), dtype=products.dtype)

  def project(i, others):
    def once(c, j):
      d, square = jnp.sum(c * products[j]), products[j, j]
      meets = (d < 0) & (square > 0)
      if against == 'others':
        meets &= j != i
      share = d / jnp.where(meets, square, 1.0)
      return c.at[j].add(jnp.where(meets, -share, 0.0)), None

    return jax.lax.scan(once, rows[i], others)[0]

  return jax.vmap(project)(jnp.arange(len(rows)), order).sum(axis=0)


def nash(
  products: jax.Array, iterations: int = 50
) -> tuple[jax.Array, jax.Array]:
  """Return the positive alpha [K] with G alpha = 1 / alpha.

  It is the minimum of alpha G alpha / 2 - sum_k ln alpha_k, which is strictly
  convex and self-concordant: damped Newton steps reach it from anywhere and
  stay positive.

  Args:
    products: [K, K], the products G of the gradients, positive semidefinite.
    iterations: number of Newton steps.

  Returns:
    alpha, and bool []: False where G is not finite or there is no solution
    (within float32); alpha then means nothing.
  """
  norms = jnp.sqrt(jnp.diagonal(products))
  # In units of 1 / norm, alpha of tasks that are orthogonal is 1.
  cosines = products / (norms[:, None] * norms)
  unit = jnp.eye(len(products), dtype=products.dtype)

  def newton(_, a):
    residual = a * jnp.sum(cosines * a, axis=1) - 1.0
    hessian = a[:, None] * cosines * a + unit
    move = jnp.linalg.solve(hessian, residual)
    decrement = jnp.sqrt(jnp.maximum(jnp.sum(residual * move), 0.0))
    rate = jnp.where(decrement < 0.25, 1.0, 1.0 / (1.0 + decrement))
    return a * (1.0 - rate * move)

  a = jax.lax.fori_loop(0, iterations, newton, jnp.ones_like(norms))
  residual = a * jnp.sum(cosines * a, axis=1) - 1.0
  # A comparison with what is not finite is False.
  return a / norms, jnp.all((a > 0) & (jnp.abs(residual) < 1e-3))
