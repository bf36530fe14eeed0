"""Check that attention over cut tokens equals attention over all of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax import sharding
from vfm_jax.ops import attention_reference, sequence_parallel

B, N, H, D = 2, 24, 4, 8
MESH = sharding.Mesh(data=1, fsdp=1, tensor=2, seq=4)


def draw(kv_heads=H, keys=N, seed=0):
  rng = np.random.default_rng(seed)
  shapes = (B, N, H, D), (B, keys, kv_heads, D), (B, keys, kv_heads, D)
  return [rng.normal(size=s).astype(np.float32) for s in shapes]


def graded(attend, arrays, weight):
  """Return the output and the gradients of a weighted sum of it."""

  def loss(*arrays):
    out = attend(*arrays)
    return (out * weight).sum(), out

  grad = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
  (_, out), grads = jax.jit(grad)(*arrays)
  return out, *grads


def segments():
  """Return ids whose segments lie across parts, with padding at the end."""
  lengths = (5, 13, 6), (10, 10, 4)
  rows = [np.repeat([3, 1, -1], n) for n in lengths]
  return np.stack(rows).astype(np.int32)


def check(way, *, kv_heads=H, keys=N, ids=None, cap=None):
  arrays = draw(kv_heads, keys)
  weight = np.random.default_rng(1).normal(size=(B, N, H, D))
  options = dict(segment_ids=ids, logit_cap=cap)
  want = (
    attention_reference.reference_attention(*arrays, **options).out,
    *attention_reference.reference_gradients(*arrays, weight, **options),
  )
  mesh = sharding.make_mesh(MESH)
  with sharding.activations(mesh):
    attend = functools.partial(
      sequence_parallel.attend,
      segment_ids=None if ids is None else jnp.asarray(ids),
      logit_cap=cap,
      way=way,
    )
    got = graded(attend, arrays, weight)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)
  assert got[0].sharding.spec[1] == 'seq'
  return got


@pytest.mark.parametrize('way', ['ring', 'gathered'])
def test_segments_and_caps(way):
  out, *_ = check(way, kv_heads=2, ids=segments(), cap=2.0)
  # Padding attends to nothing.
  assert not np.any(np.asarray(out)[:, -4:])


@pytest.mark.slow
@pytest.mark.parametrize('way', ['ring', 'gathered'])
@pytest.mark.parametrize(
  'case', [{}, {'kv_heads': 2}, {'keys': 40}, {'cap': 3.0}, {'ids': 'some'}]
)
def test_all_else(way, case):
  if 'ids' in case:
    case = {'ids': segments()}
  check(way, **case)


def test_gathered_keys_go_to_the_kernel_and_are_not_saved():
  seen = []

  def inner(q, k, v, *, segment_ids, scale, logit_cap):
    seen.append((q.shape, k.shape, segment_ids, scale, logit_cap))
    logits = jnp.einsum('bnhd,bmhd->bhnm', q, k) * scale
    return jnp.einsum('bhnm,bmhd->bnhd', jax.nn.softmax(logits), v)

  mesh = sharding.make_mesh(MESH)
  arrays = draw()
  with sharding.activations(mesh):
    attend = functools.partial(
      sequence_parallel.attend, inner=inner, way='gathered'
    )
    pull = jax.eval_shape(lambda *args: jax.vjp(attend, *args)[1], *arrays)
  local = (B, N // 4, H // 2, D)
  assert seen[0] == (local, (B, N, H // 2, D), None, D**-0.5, None)
  saved = [x.shape for x in jax.tree.leaves(pull)]
  # The keys and values of this device only; the rest is what `inner` computes.
  assert saved.count((B, N, H, D)) == 3
  assert not [s for s in saved if s[1:] == (N, H // 2, D)]


def test_what_is_chosen(monkeypatch):
  assert sequence_parallel.choose(10) == 'gathered'
  assert sequence_parallel.choose(2**30) == 'ring'
  monkeypatch.setattr(sequence_parallel, 'ROOM', 1000)
  mesh = sharding.make_mesh(MESH)

  def text(arrays):
    with sharding.activations(mesh):
      attend = functools.partial(sequence_parallel.attend)  # a new one each
      return str(jax.make_jaxpr(attend)(*arrays))

  assert 'ppermute' in text(draw())
  monkeypatch.setattr(sequence_parallel, 'ROOM', 10**6)
  assert 'all_gather' in text(draw())


@pytest.mark.parametrize(
  ('mesh', 'message'),
  [
    (sharding.Mesh(seq=8), r'mesh\.seq=8 does not divide 20 keys'),
    (sharding.Mesh(tensor=8), r'mesh\.tensor=8 does not divide 4 heads'),
  ],
)
def test_errors(mesh, message):
  with (
    sharding.activations(sharding.make_mesh(mesh)),
    pytest.raises(sharding.ShardingError, match=message),
  ):
    sequence_parallel.attend(*draw(keys=20))
  with pytest.raises(ValueError, match="found 'circle'"):
    sequence_parallel.attend(*draw(), way='circle')


def test_refusals():
  assert not sequence_parallel.refuse(8, 16, False, 4)
  assert 'a mask' in sequence_parallel.refuse(8, 16, True, 4)
  assert '9 queries' in sequence_parallel.refuse(9, 16, False, 4)
