import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.ops import blocks, guided, masking

GRID = (3, 2, 8)
KEYS = jax.random.split(jax.random.key(0), 500)


@functools.partial(jax.jit, static_argnums=0)
def hidden(mask, attention):
  return mask.guided(KEYS, GRID, jnp.broadcast_to(attention, (500, 48)))


def test_each_slice_shows_cells_of_its_own():
  mask = guided.AttentionGuided(ratio=0.8)
  seen = ~np.asarray(hidden(mask, jnp.ones(48))).reshape(500, 3, 16)
  # 16 - floor(0.8 * 16) cells; in raster order they are drawn evenly.
  assert (seen.sum(-1) == 4).all()
  assert (seen[:, 0] != seen[:, 1]).any(-1).mean() > 0.9
  np.testing.assert_allclose(seen.mean((0, 1)), 0.25, atol=0.06)
  assert masking.num_hidden(mask, GRID, path='objective.mask') == 36


def test_what_is_attended_to_is_seen():
  mask = guided.AttentionGuided(ratio=0.8)
  rising = jnp.tile(jnp.arange(1, 17) / 160, 3)
  seen = 1 - np.asarray(hidden(mask, rising)).reshape(-1, 16).mean(0)
  assert (np.diff(seen.reshape(4, 4).mean(1)) > 0.05).all()
  one = jnp.full(48, 1e-20).at[5::16].set(1.0)
  seen = ~np.asarray(hidden(mask, one)).reshape(-1, 16)
  assert seen[:, 5].all()
  # Attention that underflows to nothing is still a permutation.
  none = np.asarray(hidden(mask, jnp.zeros(48))).reshape(-1, 16)
  assert (none.sum(-1) == 12).all()


def test_recorded_order():
  order = np.tile(np.roll(np.arange(4), 1), (2, 1))
  mask = guided.from_order(order, (2, 2, 2), ratio=0.5)
  np.testing.assert_array_equal(mask, [[0, 1, 1, 0] * 2])
  with pytest.raises(ValueError, match='ratio from 0 to 1, found 2'):
    guided.from_order(order, (2, 2, 2), ratio=2)


def test_any_sampler_splits():
  even = np.ones((2, 48), np.float32)
  tube = functools.partial(masking.tube, ratio=0.5)
  for sampler, seen, hidden in (
    (guided.AttentionGuided(0.75), 12, 36),
    (tube, 24, 24),
    (blocks.MultiBlock(context=0.25, targets=0.5), 12, 24),
  ):
    split = jax.eval_shape(
      lambda keys, s=sampler: guided.split(s, keys, GRID, even), KEYS[:2]
    )
    assert split.visible_idx.shape == (2, seen)
    assert split.target_idx.shape == (2, hidden)
  with pytest.raises(ValueError, match=r'`objective\.masks\.1` AttentionGui'):
    guided.split(
      guided.AttentionGuided(), KEYS[:2], GRID, None, path='objective.masks.1'
    )
