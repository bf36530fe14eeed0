"""Do the arithmetic of flash attention on tiles.

The Mosaic GPU kernels call these functions on what is in registers, the tests
on arrays. Logits and the log-sum-exp are in base 2 throughout: exp2 is what the
hardware has. A tile is [queries, keys]; where `queries` is 1 it is transposed,
and what belongs to a query runs along axis 1.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

LOG2E = math.log2(math.e)
# A forbidden logit, and where the running maximum starts: exp2 of the first
# minus the second is 0, so that a row without keys sums to 0, not to NaN. The
# square of either is finite, as `sloped` needs it.
_FORBIDDEN = -1e15
_FLOOR = -1e14


class Running(NamedTuple):
  """Hold the running maximum and the sum of a row, f32 [queries]."""

  top: jax.Array
  total: jax.Array


def logits(
  products: jax.Array, *, scale: float, logit_cap: float | None
) -> jax.Array:
  """Return the logits in base 2 of q k^T."""
  if logit_cap is None:
    return products * (scale * LOG2E)
  return jnp.tanh(products * (scale / logit_cap)) * (logit_cap * LOG2E)


def forbid(x: jax.Array, allowed: jax.Array) -> jax.Array:
  """Return the logits with those forbidden that are not allowed."""
  return jnp.where(allowed, x, _FORBIDDEN)


def same_segment(
  query_ids: jax.Array,
  key_ids: jax.Array,
  shape: tuple[int, int],
  queries: int = 0,
) -> jax.Array:
  """Say which queries and keys have one id; padding has ids that differ."""
  return spread(query_ids, shape, queries) == spread(
    key_ids, shape, 1 - queries
  )


def before(shape: tuple[int, int], left: jax.Array | int) -> jax.Array:
  """Say which keys of a tile are among the first `left` of them."""
  return lax.broadcasted_iota(jnp.int32, shape, 1) < left


def start(rows: int) -> Running:
  """Return the state of rows that have seen no key."""
  return Running(
    jnp.full((rows,), _FLOOR, jnp.float32), jnp.zeros((rows,), jnp.float32)
  )


def softmax_step(
  x: jax.Array, running: Running
) -> tuple[jax.Array, jax.Array, Running]:
  """Go on by a tile of keys (FlashAttention-2, algorithm 1).

  Args:
    x: logits f32 [queries, keys].
    running: state of the rows.

  Returns:
    Weights without normaliser, the factor [queries] of what was accumulated
    before, and the new state.
  """
  top = jnp.maximum(running.top, x.max(axis=1))
  factor = jnp.exp2(running.top - top)
  weight = jnp.exp2(x - spread(top, x.shape, 0))
  return weight, factor, Running(top, running.total * factor + weight.sum(1))


def finish(acc: jax.Array, running: Running) -> tuple[jax.Array, jax.Array]:
  """Return the output f32 [queries, D] and the log-sum-exp [queries].

  A row that saw no key has output 0, and a log-sum-exp of 0 that makes its
  weights 0 in the backward pass.
  """
  empty = running.total == 0.0
  total = jnp.where(empty, 1.0, running.total)
  out = acc * spread(1.0 / total, acc.shape, 0)
  lse = running.top + jnp.log(total) * LOG2E
  return out, jnp.where(empty, 0.0, lse)


def weights(x: jax.Array, lse: jax.Array, queries: int = 0) -> jax.Array:
  """Return the weights of logits x, given the log-sum-exp of their rows."""
  return jnp.exp2(x - spread(lse, x.shape, queries))


def sloped(
  weight: jax.Array, x: jax.Array, logit_cap: float | None
) -> jax.Array:
  """Return the weights times the slope of the cap at logits x in base 2.

  A forbidden logit is far beyond the cap, and its weight is 0: the product is
  0, for the slope is finite.
  """
  if logit_cap is None:
    return weight
  tanh = x * (1.0 / (logit_cap * LOG2E))
  return weight * (1.0 - tanh * tanh)


def logit_gradient(
  weight: jax.Array, dweight: jax.Array, delta: jax.Array, queries: int = 0
) -> jax.Array:
  """Return the gradient of the logits before their cap.

  Args:
    weight: softmax of a tile, `sloped`.
    dweight: gradient of the weights, dO V^T.
    delta: sum of dO * O over the features, f32 [queries].
    queries: axis of the queries.
  """
  return weight * (dweight - spread(delta, weight.shape, queries))


def spread(x: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
  """Return x [shape[axis]] along the axis of a tile."""
  return lax.broadcast_in_dim(x, shape, (axis,))
