import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.ops import gating

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(6, 9)).astype(np.float32)


@pytest.mark.parametrize('count', [1, 4, 9])
def test_weights_are_a_softmax_over_the_largest(count):
  got = np.asarray(jax.jit(gating.mix, static_argnums=1)(LOGITS, count))
  assert ((got > 0).sum(-1) == count).all()
  np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-6)
  for weights, logits in zip(got, LOGITS, strict=True):
    best = np.argsort(-logits)[:count]
    want = np.exp(logits[best])
    np.testing.assert_allclose(weights[best], want / want.sum(), rtol=1e-5)


def test_equal_logits_still_choose_as_many():
  got = gating.mix(jnp.zeros((2, 5)), 2)
  np.testing.assert_array_equal(got, [[0.5, 0.5, 0, 0, 0]] * 2)


def test_gradients_reach_the_chosen_alone():
  grad = jax.grad(lambda x: gating.mix(x, 3)[0, 0] ** 2)
  order = np.array([[3.0, 1.0, 2.0, 0.5]], np.float32)
  got = np.asarray(grad(order))[0]
  assert (got[:3] != 0).all()
  assert got[3] == 0


def test_chance_is_what_new_noise_gives():
  """Draw one prompt's noise again, many times, the others' as they are."""
  clean, std = LOGITS[0], np.full(9, 0.7, np.float32)
  noisy = clean + std * RNG.normal(size=9).astype(np.float32)
  got = np.asarray(gating.chance(clean, noisy, std, 3))
  for i in range(9):
    again = clean[i] + std[i] * RNG.normal(size=20_000)
    rest = np.sort(np.delete(noisy, i))[::-1]
    assert got[i] == pytest.approx((again > rest[2]).mean(), abs=0.015)


def test_variation():
  rows = np.array([[2.0, 2, 2], [0, 0, 0], [0, 0, 3], [0, 0, 30]])
  got = np.asarray(gating.cv_squared(jnp.asarray(rows)))
  np.testing.assert_allclose(got, [0, 0, 2, 2], rtol=1e-5)


@pytest.mark.parametrize('count', [0, 10])
def test_counts_out_of_range(count):
  with pytest.raises(ValueError, match=rf'from 1 to 9, found {count}'):
    gating.mix(LOGITS, count)
  with pytest.raises(ValueError, match=rf'from 1 to 8, found {count}'):
    gating.chance(LOGITS, LOGITS, jnp.ones(9), count)
