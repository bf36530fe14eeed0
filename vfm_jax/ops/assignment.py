"""Match rows with columns at the least cost (linear assignment)."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

Impl = Literal['auto', 'device', 'host']


def assign(cost: jax.Array, *, impl: Impl = 'auto') -> jax.Array:
  """Return the column int32 [P] of each row with the least total cost.

  Among equally good matchings the choice is fixed, but may differ from one
  implementation to the other.

  Args:
    cost: int32 [P, P], from 0 to about 10^6: sums of P of them must fit.
    impl: 'device' is a compiled loop. 'host' calls scipy through a callback:
      it spares a GPU thousands of tiny kernels, but keeps the program out of
      the compilation cache. 'auto' takes 'host' on GPUs and 'device' elsewhere.

  Raises:
    ValueError: no square matrix of integers, or an unknown implementation.
  """
  square = cost.ndim == 2 and cost.shape[0] == cost.shape[1]
  if not square or not jnp.issubdtype(cost.dtype, jnp.integer):
    raise ValueError(
      'expected costs of integers [P, P], found '
      f'{cost.dtype.name}{list(cost.shape)}'
    )
  found = {'auto': _by_platform, 'device': _on_device, 'host': _on_host}
  if impl not in found:
    raise ValueError(
      f"expected impl 'auto', 'device' or 'host', found {impl!r}"
    )
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size <= 1:
    return found[impl](cost)
  # Every device solves all of it: cut over the mesh, each iteration of the
  # loop would wait for messages.
  whole = jax.sharding.PartitionSpec()
  return jax.shard_map(
    found[impl], mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False
  )(cost)


def _by_platform(cost):
  # For a GPU that is not here, as in compiling ahead, no host can be called.
  if jax.default_backend() != 'gpu':
    return _on_device(cost)
  return jax.lax.platform_dependent(
    cost, cuda=_on_host, rocm=_on_host, default=_on_device
  )


def _on_host(cost):
  out = jax.ShapeDtypeStruct(cost.shape[:1], jnp.int32)
  return jax.pure_callback(_scipy, out, cost, vmap_method='sequential')


def _scipy(cost):
  return optimize.linear_sum_assignment(np.asarray(cost))[1].astype(np.int32)


def _on_device(cost):
  """Add one row after another along a shortest augmenting path."""
  size = len(cost)
  start = (
    jnp.zeros(size, jnp.int32),  # prices of the rows
    jnp.zeros(size, jnp.int32),  # prices of the columns
    jnp.full(size, size, jnp.int32),  # row of each column, `size` is none
    jnp.zeros(size, jnp.int32),  # column of each row
  )
  body = functools.partial(_augment, cost.astype(jnp.int32))
  return jax.lax.fori_loop(0, size, body, start)[3]


def _augment(cost, row, state):
  """Match one more row, keeping every reduced cost at 0 or more."""
  size = len(cost)
  far = jnp.iinfo(jnp.int32).max // 4
  u, v, row_of, column_of = state

  def grow(tree):
    """Reach from the last row, then take the nearest column not yet taken."""
    dist, parent, taken, _, base, last = tree
    reach = base + cost[last] - u[last] - v
    better = ~taken & (reach < dist)
    dist = jnp.where(better, reach, dist)
    parent = jnp.where(better, last, parent)
    # Of equally near columns, a free one ends the search.
    order = 2 * dist + (row_of < size)
    column = jnp.argmin(jnp.where(taken, 2 * far + 1, order))
    taken = taken.at[column].set(True)
    return dist, parent, taken, column, dist[column], row_of[column]

  none, zero = jnp.full(size, size, jnp.int32), jnp.int32(0)
  dist, parent, taken, column, base, _ = jax.lax.while_loop(
    lambda tree: tree[-1] < size,
    grow,
    (jnp.full(size, far), none, jnp.zeros(size, bool), zero, zero, row),
  )
  # The free column is at distance `base`, so that its own price stays.
  gain = jnp.where(taken, base - dist, 0)
  v = v - gain
  u = u.at[row_of].add(gain, mode='drop').at[row].add(base)

  def flip(walk):
    """Give the column to its parent, which leaves another one behind."""
    column, row_of, column_of, _ = walk
    owner = parent[column]
    before = column_of[owner]
    row_of = row_of.at[column].set(owner)
    return before, row_of, column_of.at[owner].set(column), owner

  _, row_of, column_of, _ = jax.lax.while_loop(
    lambda walk: walk[-1] != row, flip, (column, row_of, column_of, zero - 1)
  )
  return u, v, row_of, column_of
