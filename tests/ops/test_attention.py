"""Check the implementations that run on any device, and the dispatch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vfm_jax.ops import attention as att
from vfm_jax.ops import attention_measured, attention_table
from vfm_jax.ops.attention_reference import (
  reference_attention,
  reference_gradients,
)
from vfm_jax.ops.attention_spec import Spec

CPU = Spec(
  platform='cpu',
  dtype='float32',
  head_dim=64,
  batch=2,
  queries=128,
  keys=128,
  heads=4,
  kv_heads=4,
  device_kind='cpu',
  jax=(0, 12, 0),
)
GPU = dataclasses.replace(
  CPU,
  platform='gpu',
  dtype='bfloat16',
  device_kind='NVIDIA H200',
  capability=(9, 0),
)
TPU = dataclasses.replace(
  CPU, platform='tpu', dtype='bfloat16', device_kind='TPU v5 lite'
)


def change(spec, **kwargs):
  return dataclasses.replace(spec, **kwargs)


def qkv(n, m=None, heads=2, kv_heads=None, dim=8, batch=2, seed=0):
  rng = np.random.default_rng(seed)
  shapes = [
    (batch, n, heads, dim),
    *[(batch, m or n, kv_heads or heads, dim)] * 2,
  ]
  return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]


def check(args, impl='auto', **options):
  """Compare forward and backward with the float64 reference."""
  do = jnp.cos(jnp.arange(args[0].size, dtype=jnp.float32))
  do = do.reshape(args[0].shape)

  @jax.jit
  def run(*args):
    fn = lambda *a: att.attention(*a, impl=impl, **options)  # noqa: E731
    out, pull = jax.vjp(fn, *args)
    return out, pull(do)

  got = run(*args)
  want = reference_attention(*args, **options).out
  want = want, tuple(reference_gradients(*args, do, **options))
  # Gradients of k and v sum over all queries, in another order in blocks:
  # float32 errors grow with the largest sum.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=0, atol=3e-6 * max(np.abs(b).max(), 1)
    ),
    got,
    want,
  )


@pytest.mark.parametrize(('n', 'm'), [(5, 9), (300, 40)])
def test_matches_the_reference_forward_and_backward(n, m):
  check(qkv(n, m))


IDS = jnp.array([[0, 0, 1, 1, 1, -1], [2, 2, 2, 2, -1, -1]])


def test_all_options_at_once():
  check(
    [3 * x for x in qkv(6, heads=6, kv_heads=2)],
    segment_ids=IDS,
    mask=jnp.arange(6)[:, None] >= jnp.arange(6),
    logit_cap=2.0,
    scale=0.7,
  )


@pytest.mark.slow
@settings(
  max_examples=25, deadline=None, suppress_health_check=list(HealthCheck)
)
@given(
  n=st.integers(1, 12),
  groups=st.sampled_from([1, 3]),
  cap=st.sampled_from([None, 1.5]),
  masked=st.booleans(),
  data=st.data(),
)
def test_any_shape(n, groups, cap, masked, data):
  row = st.lists(st.integers(-1, 2), min_size=n, max_size=n)
  ids = data.draw(st.none() | st.tuples(row, row))
  mask = jnp.arange(n)[:, None] >= jnp.arange(n) if masked else None
  check(
    qkv(n, heads=2 * groups, kv_heads=2, dim=4, seed=n),
    segment_ids=None if ids is None else jnp.asarray(ids, jnp.int32),
    mask=mask,
    logit_cap=cap,
  )


def test_segments_do_not_see_each_other_and_empty_rows_are_zero():
  q, k, v = qkv(6)

  @jax.jit
  def run(q):
    out = att.attention(q, k, v, segment_ids=IDS)
    return out[:, 5].sum(), out

  (value, out), grad = jax.value_and_grad(run, has_aux=True)(q)
  alone = reference_attention(q[:1, 2:5], k[:1, 2:5], v[:1, 2:5]).out
  np.testing.assert_allclose(out[:1, 2:5], alone, atol=1e-5)
  assert value == 0
  assert not np.any(grad)
  lse = reference_attention(q, k, v, segment_ids=IDS).lse
  assert np.all(lse[:, :, 5] == -np.inf)


def test_bfloat16_keeps_its_type_and_accumulates_in_float32():
  args = [x.astype(jnp.bfloat16) for x in qkv(300)]
  want = reference_attention(*args).out
  got = jax.jit(att.attention)(*args)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=2e-2)


def test_cpu_training_keeps_its_program():
  """The operations of a plain call are counted: each pass over N x N costs."""
  args = qkv(7)
  grad = jax.grad(lambda *a: att.attention(*a).sum(), (0, 1, 2))
  names = [str(e.primitive) for e in jax.make_jaxpr(grad)(*args).eqns]
  assert names.count('dot_general') == 6
  assert names.count('exp') == 1
  assert 'shard_map' not in names


def test_resolve_takes_the_first_that_accepts():
  chosen, refusals = att.resolve(GPU)
  assert chosen.name == 'cudnn'
  assert set(refusals) == {'pallas_tpu', 'pallas_gpu'}
  assert 'was not measured' in refusals['pallas_gpu']
  chosen, refusals = att.resolve(CPU)
  assert chosen.name == 'xla_saved'
  assert 'needs a GPU' in refusals['cudnn']
  assert att.resolve(TPU)[0].name == 'pallas_tpu'
  chosen, refusals = att.resolve(change(TPU, masked=True))
  assert chosen.name == 'xla'
  assert refusals['pallas_tpu'] == 'takes no mask'


def test_a_kernel_is_taken_when_named():
  assert att.resolve(GPU, 'pallas_gpu')[0].name == 'pallas_gpu'


@pytest.mark.parametrize(
  ('spec', 'impl', 'message'),
  [
    (CPU, 'cudnn', 'needs a GPU, found cpu'),
    (change(GPU, dtype='float32'), 'cudnn', 'found float32'),
    (change(GPU, head_dim=44), 'cudnn', 'head_dim that 8 divides'),
    (change(GPU, masked=True), 'cudnn', 'takes no mask'),
    (change(GPU, segments=True), 'cudnn', 'no segment ids'),
    (change(GPU, logit_cap=True), 'cudnn', 'takes no logit cap'),
    (change(CPU, masked=True), 'xla_saved', 'no mask'),
    (change(CPU, segments=True), 'xla_saved', 'no segment ids'),
    (change(CPU, logit_cap=True), 'xla_saved', 'no logit cap'),
    (change(CPU, dtype='bfloat16'), 'xla_saved', 'needs float32'),
    (GPU, 'xla_saved', 'is for the CPU'),
    (CPU, 'pallas_tpu', 'needs a TPU, found cpu'),
    (change(TPU, masked=True), 'pallas_tpu', 'takes no mask'),
    (change(GPU, undivided='3 heads'), 'pallas_gpu', 'pallas_gpu: 3 heads'),
    (CPU, 'flash', "one of .*found 'flash'"),
  ],
)
def test_a_named_implementation_that_refuses_is_an_error(spec, impl, message):
  with pytest.raises(ValueError, match=message):
    att.resolve(spec, impl)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(v=np.zeros((2, 4, 2, 3))), 'k and v of one shape'),
    (dict(k=np.zeros((2, 4, 3, 8)), v=np.zeros((2, 4, 3, 8))), 'divides the 2'),
    (dict(segment_ids=np.zeros((2, 5), int)), r'expected them to be \(2, 4\)'),
    (dict(logit_cap=0.0), 'logit_cap above 0, found 0.0'),
  ],
)
def test_arguments_that_do_not_go_together(changes, message):
  q, k, v = qkv(4)
  with pytest.raises(ValueError, match=message):
    att.attention(**(dict(q=q, k=k, v=v) | changes))


def test_our_gpu_kernel_is_preferred_only_where_measured_to_be_faster():
  def row(ours, best, tokens=128):
    return attention_measured.Row(
      'NVIDIA H200', 'bfloat16', 64, tokens, ours, best, '0.12.0', '2027-01-01'
    )

  assert attention_measured.defer(GPU, [row(1.0, 2.0)]) is None
  reason = attention_measured.defer(GPU, [row(2.0, 1.0)])
  assert reason is not None
  assert 'took 2 ms where another took 1 ms' in reason
  far = attention_measured.defer(GPU, [row(1.0, 2.0, tokens=1024)])
  assert far is not None
  assert 'NVIDIA H200' in far
  # Of several lengths the nearest decides.
  near = [row(2.0, 1.0, tokens=150), row(1.0, 2.0, tokens=120)]
  assert attention_measured.defer(GPU, near) is None


def test_the_table_says_what_runs_and_why_not_another():
  q, k, v = qkv(6, heads=4, kv_heads=2)

  def trace(**options):
    jax.eval_shape(lambda *a: att.attention(*a, **options), q, k, v)

  with attention_table.recorded() as calls:
    trace()
    trace()
    trace(segment_ids=IDS, logit_cap=1.0)
  trace(impl='xla')
  assert [c.name for c in calls] == ['xla_saved', 'xla']
  text = attention_table.table(calls)
  assert 'attention on cpu, by device:' in text
  assert '4/2    8    float32  -             xla_saved' in text
  assert 'float32  segments+cap  xla' in text
  assert 'not cudnn for xla_saved: needs a GPU, found cpu' in text
  assert attention_table.table([]) == 'attention: no calls'
