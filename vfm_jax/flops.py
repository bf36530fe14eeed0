"""Count the matrix-multiply FLOPs of a function, from its jaxpr.

XLA's cost analysis counts the body of a scan once and needs the devices; this
walk multiplies by the trip count and needs shapes only. What no output needs
is left out, as the compiler drops it. So is elementwise work, as in the usual
24ND^2 + 4N^2D of a transformer block; one multiply-add is 2 FLOPs. What an
implementation adds counts: attention in float32 on CPU has one column more in
one product.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval


def count(fn: Callable[..., Any], *args: Any) -> int:
  """Return the FLOPs of `fn(*args)` over the whole mesh.

  Args:
    fn: traceable function, jitted or not.
    *args: arrays or trees of shape structs; nothing is allocated.

  Raises:
    ValueError: matrix products in a while loop, whose length is not known.
  """
  jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
  live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return _count(live)


def _count(jaxpr: core.Jaxpr) -> int:
  return sum(_equation(eqn) for eqn in jaxpr.eqns)


def _equation(eqn: core.JaxprEqn) -> int:
  name = eqn.primitive.name
  if name in ('dot_general', 'ragged_dot', 'ragged_dot_general'):
    return _dot(eqn)
  if name == 'conv_general_dilated':
    return _conv(eqn)
  if name == 'cond':
    return max(_count(branch.jaxpr) for branch in eqn.params['branches'])
  inner = sum(_count(j) for j in _jaxprs(eqn))
  if name == 'scan':
    return inner * eqn.params['length']
  if name == 'shard_map':
    return inner * eqn.params['mesh'].size
  if name == 'pallas_call':
    return inner * math.prod(eqn.params['grid_mapping'].grid)
  if name == 'while' and inner:
    raise ValueError(
      'a while loop holds matrix products: its FLOPs depend on the data; '
      'use jax.lax.scan or fori_loop with a static length'
    )
  return inner


def _jaxprs(eqn: core.JaxprEqn) -> list[core.Jaxpr]:
  """Return the jaxprs among an equation's parameters."""
  found = []
  for value in eqn.params.values():
    for v in value if isinstance(value, tuple | list) else (value,):
      # A closed jaxpr, which later versions of JAX do not tell apart.
      inner = getattr(v, 'jaxpr', v)
      if isinstance(inner, core.Jaxpr):
        found.append(inner)
  return found


def _dot(eqn: core.JaxprEqn) -> int:
  """2 * contracted * (size of the result)."""
  lhs, out = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
  numbers = eqn.params.get('dimension_numbers')
  if numbers is None:
    ragged = eqn.params['ragged_dot_dimension_numbers']
    numbers = ragged.dot_dimension_numbers
  (contracting, _), _ = numbers
  k = math.prod(lhs[i] for i in contracting)
  return 2 * k * math.prod(out)


def _conv(eqn: core.JaxprEqn) -> int:
  """2 * (size of the result) * (kernel size without its output channels)."""
  kernel, out = _shape(eqn.invars[1]), _shape(eqn.outvars[0])
  features = kernel[eqn.params['dimension_numbers'].rhs_spec[0]]
  batch_groups = eqn.params['batch_group_count']
  per_output = math.prod(kernel) // features
  return 2 * math.prod(out) * per_output // batch_groups


def _shape(operand: Any) -> tuple[int, ...]:
  return operand.aval.shape
