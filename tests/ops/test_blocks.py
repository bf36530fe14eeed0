import functools

import jax
import numpy as np
import pytest

from vfm_jax.ops import blocks, masking
from vfm_jax.ops.blocks import LONG, SHORT, MultiBlock

GRID = (8, 14, 14)
N = 8 * 14 * 14
KEYS = jax.random.split(jax.random.key(0), 64)
# Of 29 and of 137 of the 196 cells, with aspects from 0.75 to 1.5.
SIZES = {
  'short': {(5, 6), (6, 5), (5, 5), (7, 4), (6, 4)},
  'long': {
    *((11, 13), (12, 11), (13, 11), (11, 12), (14, 10)),
    *((13, 10), (12, 12), (10, 13), (10, 14)),
  },
}


@functools.cache
def draw(sampler, grid=GRID):
  split = jax.jit(functools.partial(sampler, grid=grid))(KEYS)
  return [np.asarray(x) for x in split]


def as_mask(idx, n=N):
  out = np.zeros((len(idx), n), bool)
  np.put_along_axis(out, idx, True, axis=1)
  return out


@pytest.mark.parametrize('sampler', [SHORT, LONG], ids=['short', 'long'])
def test_lengths_are_static_and_what_is_predicted_is_not_seen(sampler):
  seen, wanted = draw(sampler)
  assert (seen.shape[1], wanted.shape[1]) == sampler.lengths(GRID)
  assert (np.diff(seen) > 0).all()
  assert (np.diff(wanted) > 0).all()
  assert not (as_mask(seen) & as_mask(wanted)).any()
  assert len(np.unique(seen, axis=0)) > 60


@pytest.mark.parametrize(
  ('sampler', 'name'), [(SHORT, 'short'), (LONG, 'long')], ids=str
)
def test_blocks_are_tubes_of_the_published_sizes(sampler, name):
  sizes = blocks.block_size(
    np.random.default_rng(0).random((5000, 3)),
    GRID,
    spatial_scale=sampler.spatial_scale,
    temporal_scale=sampler.temporal_scale,
    aspect=sampler.aspect,
  )
  assert (sizes[:, 0] == 8).all()
  assert {tuple(map(int, s[1:])) for s in sizes} == SIZES[name]
  hidden = blocks.in_blocks(sizes[0], np.array([[0, 1, 1]]), GRID)
  cells = hidden.reshape(8, -1)
  assert (cells == cells[0]).all()
  assert cells[0].sum() == sizes[0, 1:].prod()


def test_few_examples_run_short_of_tokens():
  """With blocks of half the tokens left, what is seen lies outside of them."""
  hidden = jax.jit(
    jax.vmap(lambda a, b: SHORT._hidden(a, b, GRID)), static_argnums=()
  )
  draws = jax.vmap(lambda k: jax.random.split(k, 3))(KEYS)
  hidden = np.asarray(hidden(draws[:, 0], draws[:, 1]))
  seen, wanted = draw(SHORT)
  enough = (~hidden).sum(1) >= seen.shape[1]
  covered = hidden.sum(1) >= wanted.shape[1]
  assert enough.mean() > 0.85
  assert covered.mean() > 0.85
  assert not (as_mask(seen) & hidden)[enough].any()
  assert not (as_mask(wanted) & ~hidden)[covered & enough].any()


def test_options_of_v_jepa_2():
  full = MultiBlock(targets=None)
  seen, wanted = draw(full)
  assert (as_mask(seen) ^ as_mask(wanted)).all()


@pytest.mark.slow
def test_further_options_of_v_jepa_2():
  seen, wanted = draw(MultiBlock(context=None))
  assert (as_mask(seen) ^ as_mask(wanted)).all()
  assert wanted.shape[1] == N // 2
  # Show one small block and predict the rest.
  inverse = MultiBlock(num_blocks=1, inverse=True, context=0.1, targets=0.5)
  seen = as_mask(draw(inverse)[0]).reshape(len(KEYS), 8, 14, 14)
  rows = seen.any((1, 3)).sum(1)
  assert rows.max() <= 7
  early = MultiBlock(last_slice=0.5, context=0.1)
  assert draw(early)[0].max() < 4 * 196


def test_what_goes_is_random_or_as_released_the_last():
  corrected, released = SHORT, MultiBlock(drop='last')
  late = [
    as_mask(draw(s)[0])[:, N // 2 :].mean() for s in (corrected, released)
  ]
  assert late[0] == pytest.approx(0.25, abs=0.02)
  assert late[1] < 0.17


def test_masks_of_other_samplers():
  mask = functools.partial(masking.tube, ratio=0.75)
  seen, wanted = blocks.complement(KEYS[:2], (2, 4, 4), mask=mask)
  assert seen.shape == (2, 8)
  assert wanted.shape == (2, 24)
  np.testing.assert_array_equal(
    as_mask(np.asarray(wanted), 32), mask(KEYS[:2], (2, 4, 4))
  )


def test_released_batches_are_cut_to_the_shortest():
  hidden = np.zeros((2, 8), bool)
  hidden[0, [0, 1, 2]] = hidden[1, [5, 6]] = True
  cut = blocks.cut_to_shortest
  seen, wanted = cut(hidden)
  assert seen.tolist() == [[3, 4, 5, 6, 7], [0, 1, 2, 3, 4]]
  assert wanted.tolist() == [[0, 1], [5, 6]]
  assert cut(hidden, rest='targets')[1].tolist() == [[0, 1, 2], [5, 6, 7]]
  assert cut(hidden, rest='context')[0][0].tolist() == [2, 3, 4, 5, 6, 7]
  assert cut(hidden, max_context=2)[0].tolist() == [[3, 4], [0, 1]]
  assert cut(hidden, inverse=True)[0].tolist() == wanted.tolist()


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (dict(spatial_scale=(0.5, 0.2)), r'`spatial_scale`.*found \(0.5, 0.2\)'),
    (dict(temporal_scale=(0.5, 1.5)), r'`temporal_scale`.*<= 1, found'),
    (dict(context=None, targets=None), 'found None for both'),
  ],
)
def test_settings_that_make_no_sense(fields, message):
  with pytest.raises(ValueError, match=message):
    MultiBlock(**fields)


def test_lengths_that_do_not_fit():
  with pytest.raises(ValueError, match=r'found 1254 and 784; change `context`'):
    MultiBlock(context=0.8).lengths(GRID)
  with pytest.raises(ValueError, match='found 0 and 4'):
    MultiBlock(context=0.1).lengths((2, 2, 2))
