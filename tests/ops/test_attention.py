import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.ops import attention as att

GPU = att.Spec('gpu', 'bfloat16', head_dim=64)
CPU = att.Spec('cpu', 'float32', head_dim=64)


def qkv(n, m=None, heads=2, dim=8):
  keys = jax.random.split(jax.random.key(0), 3)
  sizes = (n, m or n, m or n)
  return [
    jax.random.normal(k, (2, s, heads, dim))
    for k, s in zip(keys, sizes, strict=True)
  ]


@pytest.mark.parametrize(('n', 'm'), [(7, 7), (5, 9), (300, 40), (513, 30)])
def test_matches_the_reference_forward_and_backward(n, m):
  args = qkv(n, m)

  def run(fn):
    out = jax.jit(fn)(*args)
    loss = lambda *a: jnp.sin(fn(*a)).sum()  # noqa: E731
    return out, jax.jit(jax.grad(loss, (0, 1, 2)))(*args)

  got, want = run(att.attention), run(att.reference_attention)
  # Gradients of k and v sum over all queries (up to 35 here), in another
  # order in blocks: float32 errors grow with the largest sum. 8e-7 of it is
  # the most that was seen.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=0, atol=2e-6 * np.abs(b).max()
    ),
    got,
    want,
  )


def test_masks_segments_and_empty_rows():
  q, k, v = qkv(6)
  ids = jnp.array([[0, 0, 1, 1, 1, -1], [2, 2, 2, 2, -1, -1]])
  mask = jnp.arange(6)[:, None] >= jnp.arange(6)
  for kwargs in (
    dict(segment_ids=ids),
    dict(mask=mask),
    dict(mask=mask, segment_ids=ids, scale=0.3),
  ):
    got = att.attention(q, k, v, **kwargs)
    want = att.reference_attention(q, k, v, **kwargs)
    np.testing.assert_allclose(got, want, atol=1e-5)
  for fn in (att.attention, att.reference_attention):
    out, grad = jax.value_and_grad(
      lambda q, fn=fn: fn(q, k, v, segment_ids=ids)[:, 5].sum()
    )(q)
    assert out == 0
    assert not np.any(grad)
  alone = att.reference_attention(q[:1, 2:5], k[:1, 2:5], v[:1, 2:5])
  got = att.attention(q, k, v, segment_ids=ids)[:1, 2:5]
  np.testing.assert_allclose(got, alone, atol=1e-5)


def test_bfloat16_keeps_its_type_and_accumulates_in_float32():
  args = qkv(300)
  small = [x.astype(jnp.bfloat16) for x in args]
  want = att.reference_attention(*(x.astype(jnp.float32) for x in small))
  for impl in ('auto', 'xla'):
    got = att.attention(*small, impl=impl)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=2e-2)


def test_resolve_takes_the_first_that_accepts():
  assert att.resolve(GPU)[0].name == 'cudnn'
  chosen, refusals = att.resolve(CPU)
  assert chosen.name == 'xla_saved'
  assert 'needs a GPU' in refusals['cudnn']
  chosen, refusals = att.resolve(att.Spec('tpu', 'bfloat16', 64))
  assert chosen.name == 'xla'
  assert set(refusals) == {'cudnn', 'xla_saved'}


@pytest.mark.parametrize(
  ('spec', 'impl', 'message'),
  [
    (CPU, 'cudnn', 'needs a GPU, found cpu'),
    (att.Spec('gpu', 'float32', 64), 'cudnn', 'found float32'),
    (att.Spec('gpu', 'bfloat16', 44), 'cudnn', 'head_dim that 8 divides'),
    (att.Spec('gpu', 'bfloat16', 64, True), 'cudnn', 'takes no mask'),
    (att.Spec('cpu', 'float32', 64, True), 'xla_saved', 'no mask'),
    (att.Spec('cpu', 'bfloat16', 64), 'xla_saved', 'needs float32'),
    (GPU, 'xla_saved', 'is for the CPU'),
    (CPU, 'flash', "one of .*found 'flash'"),
  ],
)
def test_a_named_implementation_that_refuses_is_an_error(spec, impl, message):
  with pytest.raises(ValueError, match=message):
    att.resolve(spec, impl)
