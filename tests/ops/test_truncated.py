import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from vfm_jax.ops import truncated

normal = jax.jit(truncated.normal)


@pytest.mark.parametrize(
  ('low', 'high'),
  [(-1.0, 0.5), (0.3, np.inf), (-np.inf, -2.0), (3.0, 3.5), (6.0, 7.0)],
)
def test_normal_between_two_ends(low, high):
  z = jax.random.normal(jax.random.key(0), (4000,))
  ends = (jnp.full(4000, low), jnp.full(4000, high))
  got = np.asarray(normal(z, *ends))
  assert got.min() >= low
  assert got.max() <= high
  expected = stats.truncnorm(low, high)
  assert stats.kstest(got, expected.cdf).pvalue > 1e-3
  # The order stays.
  assert np.all(np.diff(got[np.argsort(z)]) >= 0)


def test_ends_that_cut_nothing_or_all():
  z = jax.random.normal(jax.random.key(0), (4000,))
  inf = jnp.full(4000, jnp.inf)
  np.testing.assert_allclose(normal(z, -inf, inf), z, atol=1e-4)
  far = normal(z, jnp.full(4000, 50.0), jnp.full(4000, 60.0))
  np.testing.assert_array_equal(far, 50.0)
  far = normal(z, jnp.full(4000, -60.0), jnp.full(4000, -50.0))
  np.testing.assert_array_equal(far, -50.0)


def test_uniform_between_two_ends():
  u = jnp.array([0.0, 0.3, 0.999])
  same = truncated.uniform(u, jnp.zeros(3), jnp.ones(3))
  np.testing.assert_array_equal(same, u)
  part = truncated.uniform(u, jnp.full(3, 0.5), jnp.full(3, 0.6))
  np.testing.assert_allclose(part, [0.5, 0.53, 0.5999], rtol=1e-6)
