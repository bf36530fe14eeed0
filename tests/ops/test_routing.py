import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.ops import routing

# Width, D - width, starts at some levels, and the sum over all of them.
WINDOWS = {
  384: (307, 77, {0: 0, 250: 0, 500: 5, 750: 24, 900: 51, 999: 77}, 15401),
  768: (614, 154, {0: 0, 250: 1, 500: 10, 750: 49, 900: 101, 999: 154}, 30833),
  1024: (819, 205, {500: 13}, 41041),
  1152: (921, 231, {500: 14}, 46249),
}


@pytest.mark.parametrize('channels', WINDOWS)
def test_windows_of_the_released_sizes(channels):
  width, rest, at, total = WINDOWS[channels]
  assert routing.width_of(channels, 0.8) == width
  starts = routing.starts(channels, width)
  assert channels - width == rest == starts[-1]
  assert {t: starts[t] for t in at} == at
  assert starts.sum() == total
  assert len(np.unique(starts)) == rest + 1
  steps = np.diff(starts)
  assert steps.min() == 0
  table = routing.sliding_window(channels, width)
  assert (table.sum(1) == width).all()
  overlap = (table[1:] & table[:-1]).sum(1)
  assert overlap.min() == width - steps.max()
  # The first and the last channels are those of the ends.
  assert table[0, :width].all()
  assert table[-1, -width:].all()


def test_neighbours_share_more_and_clean_levels_most():
  table = routing.sliding_window(384, 307).astype(int)
  shared = table @ table.T
  far = [shared[999, 999 - gap] for gap in (0, 50, 100, 300, 600)]
  assert far == sorted(far, reverse=True)
  assert far[-1] < far[0]
  assert shared[0, 100] > shared[899, 999]


def test_selecting_is_looking_up():
  tau = jnp.array([0, 3, 700, 999])
  got = routing.select_window(tau, 48, 38, alpha=2.0)
  table = routing.sliding_window(48, 38, alpha=2.0)
  np.testing.assert_array_equal(got, table[np.asarray(tau)])


def test_random_masks_depend_on_seed_layer_and_level_alone():
  levels = jnp.arange(1000).at[3].set(1)

  @jax.jit
  def select(layer, seed):
    return routing.select_random(levels, 20, 14, layer=layer, seed=seed)

  got = select(2, 0)
  assert (got.sum(1) == 14).all()
  np.testing.assert_array_equal(got[1], got[3])
  assert (got[0] != got[1]).any()
  for layer, seed in ((3, 0), (2, 1)):
    assert (select(layer, seed) != got).any(1).mean() > 0.99
  np.testing.assert_allclose(got.mean(0), 0.7, atol=0.06)


@pytest.mark.parametrize('beta', [0.0, 1.2, 0.01])
def test_shares_that_mask_nothing_or_all_are_refused(beta):
  with pytest.raises(ValueError, match=r'denoiser\.hooks\.mask\.beta'):
    routing.width_of(20, beta)


def test_the_product_is_cut_in_float64():
  assert routing.width_of(100, 0.29) == 28
