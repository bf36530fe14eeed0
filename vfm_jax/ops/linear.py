"""Multiply by a kernel, with gradients that suit the compiler on CPU."""

from typing import Any

import jax
import jax.numpy as jnp

from vfm_jax.ops import attention_mesh


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Return x @ kernel.

  On CPU, in float32, it has no forward-mode derivative. The device is that of
  the mesh in scope, where there is one.

  Args:
    x: [..., D].
    kernel: [D, E].
  """
  if x.dtype == jnp.float32 and attention_mesh.device().platform == 'cpu':
    return _matmul(x, kernel)
  return x @ kernel


def dot_general(
  x: jax.Array,
  kernel: jax.Array,
  dimension_numbers: Any,
  precision: Any = None,
) -> jax.Array:
  """Be the `dot_general` of a `flax.linen.Dense`: `matmul`, and no more.

  Raises:
    ValueError: another contraction or a precision is asked for.
  """
  expected = (((x.ndim - 1,), (0,)), ((), ()))
  if dimension_numbers != expected or precision is not None:
    raise ValueError(
      f'expected the contraction {expected} without a precision, found '
      f'{dimension_numbers} and {precision!r}'
    )
  return matmul(x, kernel)


@jax.custom_vjp
def _matmul(x, kernel):
  return x @ kernel


def _forward(x, kernel):
  return x @ kernel, (x, kernel)


def _backward(saved, grad):
  # The gradient of the kernel sums over the rows of both factors, which the
  # fast product does not take: the compiler would fall back to a slower one
  # that packs both. A transposed copy, kept apart so that it is not computed
  # again element by element, brings it into the form [D, N] @ [N, E].
  x, kernel = saved
  rows = x.reshape(-1, x.shape[-1])
  columns = jax.lax.optimization_barrier(rows.T)
  return grad @ kernel.T, columns @ grad.reshape(-1, grad.shape[-1])


_matmul.defvjp(_forward, _backward)
