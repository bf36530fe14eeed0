import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax import sharding
from vfm_jax.ops import moe

DEVICES = jax.devices()
RNG = np.random.default_rng(1)
B, N, D, F, E, K = 8, 3, 5, 6, 4, 2


def draw(*shape):
  return RNG.normal(size=shape).astype(np.float32)


X, KERNEL, BIAS = draw(B, N, D), draw(E, D, F), draw(E, F)


def gates_of(*lead):
  """Return softmax gates, the K largest kept; nobody takes the last expert."""
  p = np.exp(draw(*lead, E))
  p[..., -1] = 1e-3
  p /= p.sum(-1, keepdims=True)
  return np.where(p >= np.sort(p)[..., -K, None], p, 0.0).astype(np.float32)


def plain(x, kernel, bias, gates):
  gates = gates if gates.ndim == 3 else gates[:, None]
  each = np.einsum('bnd,edf->bnef', x, kernel) + bias
  return (each * gates[..., None]).sum(2)


@functools.partial(jax.jit, static_argnames='impl')
def graded(x, kernel, bias, gates, impl):
  def loss(*args):
    out = moe.mix(*args, top_k=K, impl=impl)
    return jnp.sin(out).sum(), out

  grad = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)
  (_, out), grads = grad(x, kernel, bias, gates)
  return out, grads


def close(got, want):
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def check(impl, lead):
  gates = gates_of(*lead)
  want, _ = graded(X, KERNEL, BIAS, gates, 'dense')
  close(want, plain(X, KERNEL, BIAS, gates))
  out, grads = graded(X, KERNEL, BIAS, gates, impl)
  close(out, want)
  _, expected = graded(X, KERNEL, BIAS, gates, 'dense')
  for got, of_dense in zip(grads[:3], expected[:3], strict=True):
    close(got, of_dense)
  # A gate that is not used has a gradient where all experts are computed.
  close(grads[3] * (gates > 0), expected[3] * (gates > 0))
  assert not np.any(grads[1][-1])
  assert not np.any(grads[2][-1])


@pytest.mark.parametrize(
  ('impl', 'lead'),
  [
    ('merged', (B,)),
    ('grouped', (B, N)),
  ],
)
def test_all_ways_agree(impl, lead):
  check(impl, lead)


def test_experts_over_a_mesh():
  mesh = sharding.make_mesh(sharding.Mesh(data=2, fsdp=2, expert=2))
  with sharding.activations(mesh):
    check('auto', (B, N))
    args = X, KERNEL, BIAS, gates_of(B, N)
    assert 'all_to_all' in str(jax.make_jaxpr(moe.mix)(*args))


@pytest.mark.slow
def test_experts_and_tokens_over_a_mesh():
  mesh = sharding.make_mesh(sharding.Mesh(data=1, seq=3, expert=2), DEVICES[:6])
  with sharding.activations(mesh):
    check('parallel', (B, N))


def test_kernels_are_merged_once_for_examples_that_are_alike():
  gates = np.tile(gates_of(1), (B, 1))
  mix = jax.jit(functools.partial(moe.mix, X, KERNEL, BIAS, impl='merged'))
  close(mix(gates, alike=np.True_), plain(X, KERNEL, BIAS, gates))
  other = gates_of(B)
  close(mix(other, alike=np.False_), plain(X, KERNEL, BIAS, other))
  # The kernels of the first example are those of all.
  kernel = np.einsum('e,edf->df', other[0], KERNEL)
  want = X @ kernel + (other @ BIAS)[:, None]
  close(mix(other, alike=np.True_), want)


def test_what_is_taken_by_default():
  for lead, impl in (((B,), 'merged'), ((B, N), 'dense')):
    args = X, KERNEL, BIAS, gates_of(*lead)
    got, want = (moe.mix(*args, impl=i) for i in ('auto', impl))
    np.testing.assert_array_equal(got, want)


def test_all_tokens_to_one_expert():
  gates = np.zeros((B, E), np.float32)
  gates[:, 1] = 0.5
  want = 0.5 * (X @ KERNEL[1] + BIAS[1])
  close(moe.mix(X, KERNEL, BIAS, gates, top_k=K, impl='grouped'), want)


def test_bfloat16_keeps_its_type():
  gates = gates_of(B)
  want = plain(X, KERNEL, BIAS, gates)

  @jax.jit
  def mixed(x):
    mix = functools.partial(moe.mix, x, KERNEL, BIAS, gates, top_k=K)
    return [mix(impl=i) for i in ('dense', 'merged', 'grouped')]

  for out in mixed(X.astype(jnp.bfloat16)):
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(np.float32), want, atol=0.1)


@pytest.mark.parametrize(
  ('gates', 'impl', 'message'),
  [
    (jnp.zeros((B, E + 1)), 'auto', r'gates \[B, E\] or'),
    (jnp.zeros((B, N, E)), 'merged', r'needs gates \[B, E\]'),
    (jnp.zeros((B, E)), 'parallel', 'axis `expert` is above 1.*mask.impl'),
    (jnp.zeros((B, E)), 'sparse', "found 'sparse'"),
  ],
)
def test_errors(gates, impl, message):
  with pytest.raises(ValueError, match=message):
    moe.mix(X, KERNEL, BIAS, gates, impl=impl)
