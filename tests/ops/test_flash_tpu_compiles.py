"""Compile the TPU attention kernels for chips that are not there."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest

from vfm_jax import topology
from vfm_jax.ops import flash_tpu

needs_the_compiler = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason='needs the compiler of the extra `tpu`',
)


@pytest.fixture
def schedules(benchmark_module):
  return benchmark_module('tpu_schedules')


@pytest.fixture
def bundles(benchmark_module):
  return benchmark_module('tpu_bundles')


@pytest.mark.ahead
@pytest.mark.slow
@needs_the_compiler
@pytest.mark.parametrize('segments', [False, True], ids=['plain', 'segments'])
@pytest.mark.parametrize('head_dim', [64, 72, 80, 88, 128])
@pytest.mark.parametrize('kind', ['v4', 'v5e', 'v5p', 'v6e'])
def test_all_head_dims_compile(kind, head_dim, segments, schedules):
  target = topology.parse(schedules.TARGETS[kind])
  device = topology.devices(target)[0]
  where = jax.sharding.SingleDeviceSharding(device)

  def loss(q, k, v, ids):
    out = flash_tpu.attend(
      q,
      k,
      v,
      segment_ids=ids if segments else None,
      scale=head_dim**-0.5,
      logit_cap=None,
    )
    return out.astype(jnp.float32).sum()

  for length in (1, 160, 1569, 4608):
    x = jax.ShapeDtypeStruct((2, length, 4, head_dim), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((2, length), jnp.int32)
    gradients = jax.jit(
      jax.grad(loss, (0, 1, 2)), in_shardings=where, out_shardings=where
    )
    text = gradients.lower(x, x, x, ids).compile().as_text()
    for kernel in ('flash_tpu_forward', 'flash_tpu_backward'):
      assert kernel in text


@pytest.mark.ahead
@needs_the_compiler
def test_cycles_are_those_of_the_table(schedules):
  """A change of the kernels that costs cycles or spills shows here."""
  recorded = json.loads(schedules.TABLE.read_text())['v5e']
  found = schedules.measure('v5e', 'ours')
  assert len(found) == len(recorded)
  for now, then in zip(found, recorded, strict=True):
    for key in ('kernel', 'queries', 'keys', 'head_dim'):
      assert now[key] == then[key]
    assert now['cycles'] <= 1.02 * then['cycles']
    assert now['spills'] <= then['spills']


def test_without_the_compiler_it_says_what_to_install(schedules, monkeypatch):
  monkeypatch.setattr(schedules.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ImportError, match=r'vfm_jax\[tpu\]'):
    schedules.measure('v5e', 'ours')


def test_the_table_is_what_describe_reads(schedules):
  table = json.loads(schedules.TABLE.read_text())
  assert set(table) == set(schedules.TARGETS)
  for rows in table.values():
    shapes = {(r['queries'], r['keys'], r['head_dim']) for r in rows}
    assert shapes == set(schedules.SHAPES)


LISTING = """
     0   : { vld }
   0x1   : { sbr.rel (p0) target bundleno = 4 }
   0x2   : { vst }
   0x3   : { vst }
   0x4   : { sbr.rel (p0) target bundleno = 6 }
   0x5   : { vst ;; vmatmul }
   0x6   : { vadd }
"""


def test_bundles_under_a_condition_count_apart(bundles):
  # One with a product is the work of every step.
  assert bundles._count(LISTING) == (5, 2)
  assert bundles.Schedule(3, 2, 0, 0.5).cycles(7, 1 / 2) == 22


def test_no_listing_is_an_error(bundles, tmp_path):
  with pytest.raises(ValueError, match='found 0 other files'):
    bundles.read(tmp_path, 'flash_tpu')
