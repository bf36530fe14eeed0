import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.ops.attention_reference import reference_attention
from vfm_jax.ops.banded import banded_attention

compiled = jax.jit(banded_attention, static_argnames=('half', 'block'))


def test_band_equals_dense_attention_with_a_mask():
  # Another length than a multiple of the block, a tail that is not valid, and
  # an example without anything valid.
  n, half = 37, 3
  shape = 3, 3, n, 2, 4
  q, k, v = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  valid = np.arange(n)[None] < np.array([n, 20, 0])[:, None]
  near = np.abs(np.subtract.outer(np.arange(n), np.arange(n))) <= half
  mask = jnp.asarray(valid[:, None, None] & near)
  dense = reference_attention(q, k, v, mask=mask).out
  expected = np.where(valid[..., None, None], dense, 0)
  for block in (4, 16):
    got = compiled(q, k, v, half=half, valid=jnp.asarray(valid), block=block)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_bias_picks_the_neighbour():
  n, half = 9, 2
  q = jnp.zeros((1, n, 1, 1))
  v = jnp.arange(n, dtype=jnp.float32).reshape(1, n, 1, 1)
  valid = jnp.ones((1, n), bool)
  bias = jnp.full((1, 5), -1e4).at[0, 3].set(0.0)  # the one after
  out = compiled(q, q, v, half=half, valid=valid, bias=bias)
  np.testing.assert_allclose(out[0, :-1, 0, 0], np.arange(1, n))


def test_a_window_without_neighbours_is_refused():
  q = jnp.zeros((1, 4, 1, 1))
  with pytest.raises(ValueError, match='half >= 1 neighbours, found 0'):
    banded_attention(q, q, q, half=0, valid=jnp.ones((1, 4), bool))
