import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from vfm_jax.ops import flash_tpu
from vfm_jax.ops.attention_spec import Spec

INTERPRET = pltpu.InterpretParams(detect_races=True, uninitialized_memory='nan')
SPEC = Spec(
  platform='tpu',
  dtype='bfloat16',
  head_dim=72,
  batch=2,
  queries=1568,
  keys=1568,
  heads=16,
  kv_heads=16,
)


@dataclasses.dataclass(frozen=True)
class Case:
  n: int
  m: int
  dim: int = 8
  heads: int = 1
  kv_heads: int = 1
  batch: int = 1
  dtype: str = 'float32'
  logit_cap: float | None = None
  segments: str | None = None


def ids_of(case, length, rng):
  """Draw segments of one of several kinds, int32 [B, length]."""
  if case.segments is None:
    return None
  shape = (case.batch, length)
  match case.segments:
    case 'packed':  # clips one after another, padding at the end
      return np.sort(rng.integers(0, 4, shape), -1).astype(np.int32) * np.where(
        np.arange(length) < 0.9 * length, 1, -1
      ).astype(np.int32) - np.where(np.arange(length) < 0.9 * length, 0, 1)
    case 'scattered':
      return rng.integers(-1, 3, shape, dtype=np.int32)
    case 'one':
      return np.zeros(shape, np.int32)
    case 'none':
      return np.full(shape, -1, np.int32)
  raise AssertionError(case.segments)


def reference(q, k, v, ids, scale, cap, grad, grad_lse):
  """Compute all in float64: out, lse, dq, dk, dv."""
  q, k, v, grad, grad_lse = (
    np.asarray(x, np.float64) for x in (q, k, v, grad, grad_lse)
  )
  heads, group = q.shape[2], q.shape[2] // k.shape[2]
  k, v = (np.repeat(x, group, axis=2) for x in (k, v))
  raw = scale * np.einsum('bnhd,bmhd->bhnm', q, k)
  logits = raw if cap is None else cap * np.tanh(raw / cap)
  slope = 1.0 if cap is None else 1 - np.tanh(raw / cap) ** 2
  keep = np.ones_like(raw, bool)
  if ids is not None:
    down, across = ids[0][:, None, :, None], ids[1][:, None, None]
    keep &= (down == across) & (down >= 0)
  top = np.max(logits, -1, keepdims=True, where=keep, initial=-1e30)
  weight = np.exp(np.where(keep, logits - top, -np.inf))
  total = weight.sum(-1, keepdims=True)
  some = total > 0
  weight = weight / np.where(some, total, 1)
  lse = np.where(some, top + np.log(np.where(some, total, 1)), -1e30)
  out = np.einsum('bhnm,bmhd->bnhd', weight, v)
  inner = np.einsum('bnhd,bnhd->bhn', out, grad) - grad_lse.swapaxes(1, 2)
  dweight = np.einsum('bnhd,bmhd->bhnm', grad, v)
  dlogits = weight * (dweight - inner[..., None]) * slope * scale
  dq = np.einsum('bhnm,bmhd->bnhd', dlogits, k)
  dk = np.einsum('bhnm,bnhd->bmhd', dlogits, q)
  dv = np.einsum('bhnm,bnhd->bmhd', weight, grad)
  dk, dv = (
    x.reshape(*x.shape[:2], heads // group, group, -1).sum(3) for x in (dk, dv)
  )
  return out, lse[..., 0].swapaxes(1, 2), dq, dk, dv


def check(case, capfd=None, params=INTERPRET):
  """Compare a call with the reference; return what was computed."""
  rng = np.random.default_rng(0)
  scale = 1.3 * case.dim**-0.5
  draw = lambda *shape: jnp.asarray(  # noqa: E731
    rng.standard_normal(shape), case.dtype
  )
  q = 2 * draw(case.batch, case.n, case.heads, case.dim)
  k = draw(case.batch, case.m, case.kv_heads, case.dim)
  v = draw(case.batch, case.m, case.kv_heads, case.dim)
  grad = draw(*q.shape)
  grad_lse = draw(*q.shape[:3]).astype(jnp.float32)
  q_ids = ids_of(case, case.n, rng)
  k_ids = q_ids if case.n == case.m else ids_of(case, case.m, rng)

  @jax.jit
  def run(q, k, v, grad, grad_lse):
    outs, pull = jax.vjp(
      lambda q, k, v: flash_tpu.attend_with_lse(
        q, k, v, q_ids=q_ids, k_ids=k_ids, scale=scale, logit_cap=case.logit_cap
      ),
      q,
      k,
      v,
    )
    return *outs, *pull((grad, grad_lse))

  with pltpu.force_tpu_interpret_mode(params):
    got = jax.block_until_ready(run(q, k, v, grad, grad_lse))
  if capfd is not None:
    assert 'RACE' not in ''.join(capfd.readouterr())
  ids = None if q_ids is None else (q_ids, k_ids)
  want = reference(q, k, v, ids, scale, case.logit_cap, grad, grad_lse)
  names = ('out', 'lse', 'dq', 'dk', 'dv')
  # Sums over up to thousands of terms: errors are relative to the largest.
  # bfloat16 rounds the weights and the results to 2^-9.
  rtol = 1e-5 if case.dtype == 'float32' else 2e-2
  for name, a, b, like in zip(
    names, got, want, (q, grad_lse, q, k, v), strict=True
  ):
    assert a.dtype == like.dtype
    a = np.asarray(a, np.float64)
    if name == 'lse':
      empty = b < -1e29
      assert np.array_equal(a[empty], b[empty].astype(np.float32))
      a, b = a[~empty], b[~empty]
    bound = max(np.abs(b).max(initial=0.0), 1e-3)
    np.testing.assert_allclose(
      a, b, rtol=0, atol=rtol * bound, err_msg=f'{name} of {case}'
    )
  return dict(zip(names, got, strict=True))


@pytest.mark.parametrize(
  'case',
  [
    Case(1, 1),
    Case(40, 24, dim=16, heads=4, batch=2, dtype='bfloat16'),
    Case(9, 17, dim=24, heads=4, kv_heads=2, logit_cap=2.0),
    Case(21, 21, heads=2, batch=2, segments='scattered'),
    Case(600, 600, segments='packed', dtype='bfloat16'),
    Case(600, 600, dim=72),
  ],
  ids=str,
)
def test_forward_and_gradients(case, capfd):
  check(case, capfd)


@pytest.mark.parametrize('segments', ['none', 'scattered'])
def test_an_empty_row_gives_zero(segments):
  got = check(Case(21, 21, segments=segments, logit_cap=3.0))
  empty = np.asarray(got['lse']) < -1e29
  assert empty.any()
  for name in ('out', 'dq'):
    assert not np.asarray(got[name])[empty].any()


@st.composite
def cases(draw):
  n = draw(st.integers(1, 700))
  segments = draw(st.sampled_from([None, 'packed', 'scattered', 'one']))
  m = n if segments else draw(st.integers(1, 700))
  kv_heads = draw(st.sampled_from([1, 2, 3]))
  return Case(
    n,
    m,
    dim=draw(st.sampled_from([8, 64, 72, 80, 88, 128])),
    heads=kv_heads * draw(st.sampled_from([1, 2])),
    kv_heads=kv_heads,
    batch=draw(st.integers(1, 2)),
    dtype=draw(st.sampled_from(['float32', 'bfloat16'])),
    logit_cap=draw(st.sampled_from([None, 2.0])),
    segments=segments,
  )


@pytest.mark.slow
@settings(
  max_examples=20, deadline=None, suppress_health_check=list(HealthCheck)
)
@given(cases())
def test_any_shape(case):
  check(case)


@pytest.mark.slow
@pytest.mark.parametrize('length', [1568, 4608, 4609])
@pytest.mark.parametrize('segments', [None, 'packed'])
def test_long_sequences(length, segments):
  check(Case(length, length, dim=64, segments=segments, dtype='bfloat16'))


@pytest.mark.parametrize(
  ('changes', 'reason'),
  [
    (dict(platform='gpu'), 'needs a TPU, found gpu'),
    (dict(dtype='float16'), 'found float16'),
    (dict(head_dim=70), 'found 70'),
    (dict(masked=True), 'takes no mask'),
  ],
)
def test_what_is_refused(changes, reason):
  assert flash_tpu.refuse(SPEC) is None
  assert reason in flash_tpu.refuse(dataclasses.replace(SPEC, **changes))
