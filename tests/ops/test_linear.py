import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.ops import linear


@pytest.mark.parametrize('shape', [(5, 3), (2, 7, 3), (2, 1, 4, 3)])
def test_matmul_and_its_gradients_equal_the_plain_product(shape):
  x = jax.random.normal(jax.random.key(0), shape)
  kernel = jax.random.normal(jax.random.key(1), (3, 6))

  def run(fn):
    out, vjp = jax.vjp(fn, x, kernel)
    return out, vjp(jnp.sin(out))

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    run(linear.matmul),
    run(jnp.matmul),
  )


def test_forward_mode_stays_for_other_types():
  x, kernel = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.bfloat16)
  _, tangent = jax.jvp(lambda x: linear.matmul(x, kernel), (x,), (x,))
  np.testing.assert_array_equal(tangent, x @ kernel)


def test_dot_general_refuses_what_it_does_not_do():
  x, kernel = jnp.ones((2, 3)), jnp.ones((4, 3))
  with pytest.raises(ValueError, match='expected the contraction'):
    linear.dot_general(x, kernel, (((1,), (1,)), ((), ())))
