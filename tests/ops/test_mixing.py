import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.ops import mixing

SIZE = (12, 16)


KINDS = {'mixup': 0.0, 'either': 0.5, 'cutmix': 1.0}


@pytest.fixture(scope='module')
def drawn():
  """Return {kind: (kept [n, H, W], share [n])}, by one compiled program."""

  @jax.jit
  @functools.partial(jax.vmap, in_axes=(None, 0))
  @functools.partial(jax.vmap, in_axes=(0, None))
  def draw(key, switch):
    return mixing.mixup_or_cutmix(key, SIZE, switch=switch)

  keys = jax.random.split(jax.random.key(0), 300)
  kept, share = jax.device_get(draw(keys, jnp.array(list(KINDS.values()))))
  return {k: (kept[i], share[i]) for i, k in enumerate(KINDS)}


@pytest.mark.parametrize('kind', KINDS)
def test_the_label_keeps_the_share_of_the_pixels(drawn, kind):
  kept, share = drawn[kind]
  assert kept.shape == (300, *SIZE)
  np.testing.assert_allclose(kept.mean((1, 2)), share, atol=1e-5)
  assert 0 <= share.min() < 0.4
  assert 0.8 < share.max() <= 1


def test_mixup_is_even_and_cutmix_a_box(drawn):
  blend, share = drawn['mixup']
  assert (blend == blend[:, :1, :1]).all()
  # Beta(0.8, 0.8) is symmetric, and its standard deviation is 0.31.
  assert share.mean() == pytest.approx(0.5, abs=0.06)
  assert share.std() == pytest.approx(0.31, abs=0.04)
  box, _ = drawn['cutmix']
  hidden = box == 0
  assert set(np.unique(box)) == {0.0, 1.0}
  rows, columns = hidden.any(2), hidden.any(1)
  np.testing.assert_array_equal(hidden, rows[:, :, None] & columns[:, None])
  # Without gaps: one run of rows and one of columns.
  for line in (rows, columns):
    padded = np.pad(line, ((0, 0), (1, 1))).astype(int)
    assert (np.abs(np.diff(padded, axis=1)).sum(1) <= 2).all()


def test_switch_chooses(drawn):
  def boxes(kind):
    kept = drawn[kind][0]
    return np.isin(kept, (0, 1)).all((1, 2))

  assert not boxes('mixup').any()
  assert boxes('cutmix').all()
  assert boxes('either').mean() == pytest.approx(0.5, abs=0.1)


def test_labels_keep_their_mass():
  y = jnp.array([0, 3, 1, 1])
  soft = mixing.soft_labels(y, 5, 0.1)
  np.testing.assert_allclose(soft.sum(1), 1, atol=1e-6)
  np.testing.assert_allclose(soft[0], [0.92, 0.02, 0.02, 0.02, 0.02], atol=1e-6)
  share = 0.3
  mixed = share * soft + (1 - share) * mixing.partner(soft)
  np.testing.assert_allclose(mixed.sum(1), 1, atol=1e-6)
  # Pairs exchange mass; what a class has in the batch stays the same.
  np.testing.assert_allclose(mixed.sum(0), soft.sum(0), atol=1e-6)


@pytest.mark.parametrize('accum', [1, 2, 3])
def test_partners_stay_partners_in_strided_microbatches(accum):
  rows = jnp.arange(12)
  whole = mixing.partner(rows)
  assert (whole[whole] == rows).all()
  assert (whole != rows).all()
  for k in range(accum):
    np.testing.assert_array_equal(
      mixing.partner(rows[k::accum]), whole[k::accum]
    )


def test_odd_batches_have_no_pairs():
  with pytest.raises(ValueError, match=r'even number.*found 3.*batch_size'):
    mixing.partner(jnp.arange(3))
