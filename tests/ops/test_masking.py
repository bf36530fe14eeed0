from functools import partial

import jax
import numpy as np
import pytest

from vfm_jax.ops import masking

KEYS = jax.random.split(jax.random.key(0), 4)


@pytest.mark.parametrize(
  ('grid', 'hidden'), [((8, 14, 14), 176), ((8, 16, 16), 230)]
)
def test_tube_hides_the_same_cells_in_every_slice(grid, hidden):
  mask = np.asarray(masking.tube(KEYS, grid, ratio=0.9))
  slices = mask.reshape(4, grid[0], -1)
  assert (slices == slices[:, :1]).all()
  assert (slices.sum(-1) == hidden).all()
  assert len({m.tobytes() for m in mask}) == 4
  alone = masking.tube(KEYS[2:3], grid, ratio=0.9)
  np.testing.assert_array_equal(alone[0], mask[2])


def test_tube_of_an_image():
  assert masking.tube(KEYS, (1, 4, 4), ratio=0.5).sum(-1).tolist() == [8] * 4


def test_random_hides_anywhere():
  mask = np.asarray(masking.random(KEYS, (4, 4, 4), ratio=0.75))
  assert (mask.sum(-1) == 48).all()
  assert len({s.tobytes() for s in mask[0].reshape(4, 16)}) > 1


def test_running_cell_patterns():
  patterns = masking.running_cell_patterns((8, 14, 14), ratio=0.5)
  cells = patterns.reshape(4, 8, 7, 2, 7, 2).astype(int)
  assert (cells == cells[:, :, :1, :, :1]).all()
  cell = cells[:, :, 0, :, 0].reshape(4, 8, 4)
  golden = [[1, 0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]]
  assert cell[0].tolist() == golden * 2
  assert cell[1, 0].tolist() == [0, 0, 1, 1]
  assert ((~patterns).sum(-1) == 784).all()
  # Over 4 slices in a row every cell is hidden the same number of times.
  assert (patterns.reshape(4, 8, 196)[:, 2:6].sum(1) == 2).all()
  quarter = masking.running_cell_patterns((4, 2, 2), ratio=0.75)[0]
  assert quarter.reshape(4, 4).astype(int).tolist() == [
    [1, 1, 0, 1],
    [1, 0, 1, 1],
    [0, 1, 1, 1],
    [1, 1, 1, 0],
  ]


def test_running_cell_draws_all_phases():
  keys = jax.random.split(jax.random.key(1), 32)
  mask = np.asarray(masking.running_cell(keys, (2, 4, 4)))
  known = {
    m.tobytes() for m in masking.running_cell_patterns((2, 4, 4), ratio=0.5)
  }
  assert {m.tobytes() for m in mask} == known


def test_future_hides_the_last_slices():
  mask = np.asarray(masking.future(KEYS, (4, 2, 3), ratio=0.5))
  np.testing.assert_array_equal(mask, np.arange(24)[None] >= [[12]] * 4)
  assert not np.asarray(masking.future(KEYS, (4, 1, 1), ratio=0.49))[:, 2].any()


def test_either_draws_one_of_two_masks_for_each_example():
  grid, keys = (4, 2, 2), jax.random.split(jax.random.key(1), 400)
  first = jax.jit(partial(masking.future, ratio=0.5), static_argnums=1)
  second = partial(masking.random, ratio=0.5)
  either = jax.jit(
    partial(masking.either, first=first, second=second, probability=0.25),
    static_argnums=1,
  )
  mask = np.asarray(either(keys, grid))
  assert (mask.sum(1) == 8).all()
  is_future = (mask == np.asarray(first(keys, grid))).all(1)
  assert 0.15 < is_future.mean() < 0.35
  np.testing.assert_array_equal(mask[:5], either(keys[:5], grid))


def test_num_hidden_is_static_under_jit():
  sampler = partial(masking.tube, ratio=0.5)

  @jax.jit
  def shape(keys):
    n = masking.num_hidden(sampler, (2, 2, 4), path='objective.mask')
    return masking.tube(keys, (2, 2, 4), ratio=0.5)[:, :n]

  assert shape(KEYS).shape == (4, 8)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (
      lambda: masking.running_cell(KEYS, (2, 3, 4)),
      'even token grid, found 3x4; .*`objective.encoder.patch`',
    ),
    (
      lambda: masking.either(
        KEYS,
        (3, 2, 2),
        first=partial(masking.future, ratio=0.5),
        second=partial(masking.random, ratio=0.5),
      ),
      'found 4 by `first` and 6 by `second`',
    ),
    (
      lambda: masking.tube(KEYS, (2, 2, 2), ratio=1.5),
      'ratio from 0 to 1, found 1.5',
    ),
    (
      lambda: masking.num_hidden(
        partial(masking.tube, ratio=1.0), (2, 2, 2), path='objective.mask'
      ),
      r'leave at least 1 of the 8 .*found 8 .*`objective.mask.ratio`',
    ),
    (
      lambda: masking.num_hidden(
        lambda k, g: np.zeros((1, 3)), (2, 2, 2), path='objective.mask'
      ),
      r'`objective.mask` must give bool \[B, 8\]',
    ),
  ],
)
def test_errors(call, message):
  with pytest.raises(ValueError, match=message):
    call()
