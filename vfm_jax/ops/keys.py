"""Derive random keys, one a sample: what happens to one is its own affair."""

import jax


def fold(keys: jax.Array, data: int | jax.Array) -> jax.Array:
  """Return an independent stream of each key [B], by its number."""
  return jax.vmap(jax.random.fold_in, (0, None))(keys, data)
