"""Check how calls of attention are cut over a mesh of eight CPU devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from vfm_jax import sharding
from vfm_jax.ops import attention as att
from vfm_jax.ops import attention_mesh, attention_table, attention_xla
from vfm_jax.ops.attention_reference import (
  reference_attention,
  reference_gradients,
)

IDS = np.array([[0, 0, 1, 1, 1, -1]] * 4, np.int32)


def draw(batch=4, heads=4, kv_heads=2, tokens=6):
  rng = np.random.default_rng(0)
  shapes = (
    (batch, tokens, heads, 4),
    *((batch, tokens, kv_heads, 4),) * 2,
    (batch, tokens, heads, 4),
  )
  return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]


@pytest.fixture
def kernel(monkeypatch):
  """Put a kernel in front that notes the shapes it is called with."""
  seen = []

  def run(q, k, v, **options):
    seen.append((q.shape, k.shape))
    return attention_xla.attend(q, k, v, **options)

  ours = att.Implementation('toy', lambda spec: None, run, kernel=True)
  monkeypatch.setattr(att, 'IMPLEMENTATIONS', (ours, *att.IMPLEMENTATIONS))
  return seen


def graded(do, *args, **options):
  out, pull = jax.vjp(lambda *a: att.attention(*a, **options), *args)
  return out, *pull(do)


def check(args, **options):
  """Compare forward and backward under the mesh in scope."""
  *args, do = args
  got = jax.jit(lambda *a: graded(do, *a, **options))(*args)
  want = (
    reference_attention(*args, **options).out,
    *reference_gradients(*args, do, **options),
  )
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_kernel_gets_the_part_of_one_device(kernel):
  mesh = sharding.make_mesh(sharding.Mesh(data=2, fsdp=2, tensor=2))
  with sharding.activations(mesh), attention_table.recorded() as calls:
    check(draw(), segment_ids=IDS)
  assert kernel
  assert set(kernel) == {((1, 6, 2, 4), (1, 6, 1, 4))}
  (call,) = calls
  assert (call.name, call.spec.batch, call.spec.heads) == ('toy', 1, 2)


def test_inside_of_a_shard_map_nothing_is_cut_again(kernel):
  mesh = sharding.make_mesh(sharding.Mesh(data=4), jax.devices()[:4])
  q, k, v, _ = draw()
  with jax.set_mesh(mesh):
    jax.eval_shape(
      jax.shard_map(
        att.attention,
        in_specs=PartitionSpec('data'),
        out_specs=PartitionSpec('data'),
      ),
      q,
      k,
      v,
    )
  assert kernel == [((1, 6, 4, 4), (1, 6, 2, 4))]


@pytest.mark.parametrize(
  ('sizes', 'shapes', 'reason'),
  [
    (dict(data=8), {}, 'a batch of 4 does not divide over data = 8'),
    (dict(fsdp=2, tensor=4), {}, '2 heads of keys do not divide over tensor'),
    (dict(data=2, seq=4), {}, 'seq=4 does not divide 6 queries'),
  ],
)
def test_what_does_not_divide_is_left_to_xla(kernel, sizes, shapes, reason):
  mesh = sharding.make_mesh(sharding.Mesh(**(dict(data=1) | sizes)))
  q, k, v, _ = draw(**shapes)
  with sharding.activations(mesh), attention_table.recorded() as calls:
    jax.eval_shape(att.attention, q, k, v)
    with pytest.raises(ValueError, match=reason):
      jax.eval_shape(lambda *a: att.attention(*a, impl='toy'), q, k, v)
  (call,) = calls
  assert call.name == 'xla_saved'
  assert reason in dict(call.refusals)['toy']
  assert not kernel


def test_tokens_that_are_cut_attend_to_all(kernel):
  mesh = sharding.make_mesh(sharding.Mesh(data=2, tensor=2, seq=2))
  with sharding.activations(mesh), attention_table.recorded() as calls:
    check(draw())
  assert set(kernel) == {((2, 3, 2, 4), (2, 6, 1, 4))}
  (call,) = calls
  assert (call.spec.queries, call.spec.keys) == (3, 6)


def test_segments_of_tokens_that_are_cut_go_to_xla(kernel):
  mesh = sharding.make_mesh(sharding.Mesh(data=4, seq=2))
  with sharding.activations(mesh), attention_table.recorded() as calls:
    q, k, v, _ = draw()
    jax.eval_shape(lambda *a: att.attention(*a, segment_ids=IDS), q, k, v)
  (call,) = calls
  assert 'segment ids' in dict(call.refusals)['toy']
  assert not kernel


@pytest.mark.parametrize(
  ('platform', 'kind', 'expected', 'capability'),
  [
    ('tpu', 'TPU v5 lite', 'tpu', None),
    ('gpu', 'NVIDIA H200', 'gpu', (9, 0)),
    ('cuda', 'NVIDIA A100-SXM4-80GB', 'gpu', None),
  ],
)
def test_devices_of_a_mesh_that_is_not_here(
  platform, kind, expected, capability
):
  mesh = AbstractMesh(
    (4,),
    ('data',),
    axis_types=(AxisType.Auto,),
    abstract_device=jax.sharding.AbstractDevice(
      device_kind=kind, num_cores=None, platform=platform
    ),
  )
  with jax.sharding.use_abstract_mesh(mesh):
    found = attention_mesh.device()
  want = attention_mesh.Device(expected, kind, capability)
  assert dataclasses.astuple(found) == dataclasses.astuple(want)


def test_without_a_mesh_it_is_the_device_that_is_here():
  assert attention_mesh.device().platform == 'cpu'
  assert attention_mesh.cut() == attention_mesh.Cut()
