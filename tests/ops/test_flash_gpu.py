"""Check the Mosaic GPU kernels as far as a CPU can.

Nothing here runs their products: wgmma has no interpreter. `Emulated` walks
the tiles in the kernels' order, with their arithmetic, padding, loop bounds
and masks, in plain arrays; `test_flash_gpu_compiles` compiles the kernels.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vfm_jax.ops import flash_gpu
from vfm_jax.ops import flash_gpu_plan as plan_lib
from vfm_jax.ops import flash_gpu_tiles as tiles
from vfm_jax.ops.attention_reference import (
  reference_attention,
  reference_gradients,
)
from vfm_jax.ops.attention_spec import Spec

SPEC = Spec(
  platform='gpu',
  dtype='bfloat16',
  head_dim=72,
  batch=2,
  queries=256,
  keys=256,
  heads=4,
  kv_heads=2,
  device_kind='NVIDIA H200',
  capability=(9, 0),
  jax=(0, 12, 0),
)
ROWS, TILE = plan_lib.ROWS, plan_lib.TILE


def product(a, b):
  return jnp.matmul(a, b, preferred_element_type=jnp.float32)


# What the kernels do between two waits for a barrier. `ids` is None, or the
# ids of the tile's rows and columns; `left` None, or how many keys there are.
@functools.partial(jax.jit, static_argnames=('scale', 'cap', 'queries'))
def logits_of(a, b, ids, left, *, scale, cap, queries=0):
  x = tiles.logits(product(a, b.T), scale=scale, logit_cap=cap)
  if ids is not None:
    order = ids if queries == 0 else ids[::-1]
    x = tiles.forbid(x, tiles.same_segment(*order, x.shape, queries))
  elif left is not None:
    x = tiles.forbid(x, tiles.before(x.shape, left))
  return x


@functools.partial(jax.jit, static_argnames=('scale', 'cap'))
def visit(carry, q, k, v, ids, left, *, scale, cap):
  acc, running = carry
  x = logits_of(q, k, ids, left, scale=scale, cap=cap)
  weight, factor, running = tiles.softmax_step(x, running)
  acc = acc * tiles.spread(factor, acc.shape, 0)
  return acc + product(weight.astype(v.dtype), v), running


@functools.partial(jax.jit, static_argnames=('scale', 'cap'))
def visit_q(dq, q, k, v, do, lse, delta, ids, left, *, scale, cap):
  x = logits_of(q, k, ids, left, scale=scale, cap=cap)
  weight = tiles.sloped(tiles.weights(x, lse), x, cap)
  dx = tiles.logit_gradient(weight, product(do, v.T), delta)
  return dq + product(dx.astype(k.dtype), k)


@functools.partial(jax.jit, static_argnames=('scale', 'cap'))
def visit_kv(carry, q, k, v, do, lse, delta, ids, *, scale, cap):
  dk, dv = carry
  x = logits_of(k, q, ids, None, scale=scale, cap=cap, queries=1)
  weight = tiles.weights(x, lse, queries=1)
  dv = dv + product(weight.astype(do.dtype), do)
  weight = tiles.sloped(weight, x, cap)
  dx = tiles.logit_gradient(weight, product(v, do.T), delta, queries=1)
  return dk + product(dx.astype(q.dtype), q), dv


finish = jax.jit(tiles.finish)
segments_of = jax.jit(
  flash_gpu.segments_of, static_argnames=('step', 'tile', 'of_queries')
)
visited = jax.jit(plan_lib.visited, static_argnums=(2, 3))


def pad(x):
  return np.asarray(jax.jit(flash_gpu.pad)(x))


@dataclasses.dataclass
class Emulated:
  """Walk the tiles of a call as the kernels do."""

  q: jax.Array
  k: jax.Array
  v: jax.Array
  ids: jax.Array | None
  scale: float
  cap: float | None
  visited: int = 0

  def __post_init__(self):
    (self.n, self.dim), self.m = self.q.shape[1::2], self.k.shape[1]
    self.q, self.k, self.v = map(pad, (self.q, self.k, self.v))
    self.options = dict(scale=self.scale, cap=self.cap)

  def rows(self, x, batch, start, head, count=ROWS):
    """Copy rows of a head; those out of bounds are zeros, as TMA gives."""
    part = x[batch, start : start + count, head]
    return np.pad(part, ((0, count - len(part)), (0, 0)))

  def steps(self, tile, own_step, total, of_queries):
    """Return ids of tiles and steps, and the range of steps of each tile."""
    if self.ids is None:
      tiles_here = -(-(self.n if of_queries else self.m) // tile)
      end = -(-total // own_step)
      whole = np.tile([0, end], (self.q.shape[0], tiles_here, 1))
      return None, None, whole
    found = segments_of(
      self.ids, step=own_step, tile=tile, of_queries=of_queries
    )
    return tuple(map(np.asarray, found))

  def tile_ids(self, own, streamed, batch, start, at, step):
    if own is None:
      return None
    return own[batch, start : start + ROWS], streamed[batch, at : at + step]

  def left(self, at, step, peel=True):
    if self.ids is not None or not self.m % step:
      return None
    return self.m - at if at + step > self.m or not peel else None

  def forward(self):
    b, _, heads, dim = self.q.shape
    groups = heads // self.k.shape[2]
    plan = plan_lib.forward(dim)
    own, streamed, ranges = self.steps(TILE, plan.step, self.m, True)
    count = ranges.shape[1] * TILE
    out, lse = np.zeros((b, count, heads, dim)), np.zeros((b, heads, count))
    for i, head, start in np.ndindex(b, heads, count // ROWS):
      start *= ROWS
      q = self.rows(self.q, i, start, head)
      carry = zeros(dim), tiles.start(ROWS)
      for step in range(*ranges[i, start // TILE]):
        at = step * plan.step
        k, v = (
          self.rows(x, i, at, head // groups, plan.step)
          for x in (self.k, self.v)
        )
        ids = self.tile_ids(own, streamed, i, start, at, plan.step)
        left = self.left(at, plan.step, plan.peel)
        carry = visit(carry, q, k, v, ids, left, **self.options)
        self.visited += 1
      rows = slice(start, start + ROWS)
      out[i, rows, head], lse[i, head, rows] = finish(*carry)
    return out.astype(self.q.dtype), lse.astype(np.float32)

  def backward(self, out, lse, do):
    do = pad(do)
    whole = out.shape[1]
    padding = ((0, 0), (0, whole - do.shape[1]), (0, 0), (0, 0))
    delta = (np.pad(do, padding).astype(np.float32) * out).sum(-1)
    delta = delta.swapaxes(1, 2)
    b, _, heads, dim = self.q.shape
    kv_heads = self.k.shape[2]
    groups = heads // kv_heads
    plan = plan_lib.backward_q()
    own, streamed, ranges = self.steps(TILE, plan.step, self.m, True)
    dq = np.zeros((b, whole, heads, dim), np.float32)
    for i, head, start in np.ndindex(b, heads, whole // ROWS):
      start *= ROWS
      rows = slice(start, start + ROWS)
      mine = [self.rows(x, i, start, head) for x in (self.q, do)]
      acc = zeros(dim)
      for step in range(*ranges[i, start // TILE]):
        at = step * plan.step
        k, v = (
          self.rows(x, i, at, head // groups, plan.step)
          for x in (self.k, self.v)
        )
        acc = visit_q(
          acc,
          mine[0],
          k,
          v,
          mine[1],
          lse[i, head, rows],
          delta[i, head, rows],
          self.tile_ids(own, streamed, i, start, at, plan.step),
          self.left(at, plan.step),
          **self.options,
        )
      dq[i, rows, head] = acc * self.scale
    masked = self.ids is not None or self.cap is not None
    plan = plan_lib.backward_kv(dim, masked=masked)
    own, streamed, ranges = self.steps(plan.tile, plan.step, self.n, False)
    count = ranges.shape[1] * plan.tile
    dk, dv = np.zeros((2, b, count, kv_heads, dim), np.float32)
    for i, kv_head, start in np.ndindex(b, kv_heads, count // ROWS):
      start *= ROWS
      k, v = (self.rows(x, i, start, kv_head) for x in (self.k, self.v))
      carry = zeros(dim), zeros(dim)
      first, end = ranges[i, start // plan.tile]
      for turn in range((end - first) * groups):
        head = kv_head * groups + turn // (end - first)
        at = (first + turn % (end - first)) * plan.step
        span = slice(at, at + plan.step)
        ids = self.tile_ids(own, streamed, i, start, at, plan.step)
        q, grad = (self.rows(x, i, at, head, plan.step) for x in (self.q, do))
        carry = visit_kv(
          carry,
          q,
          k,
          v,
          grad,
          lse[i, head, span],
          delta[i, head, span],
          ids,
          **self.options,
        )
      rows = slice(start, start + ROWS)
      dk[i, rows, kv_head], dv[i, rows, kv_head] = carry
    dk *= self.scale
    return (
      dq[:, : self.n, :, : self.dim],
      dk[:, : self.m, :, : self.dim],
      dv[:, : self.m, :, : self.dim],
    )


def zeros(dim):
  return np.zeros((ROWS, dim), np.float32)


def inputs(n, m, heads, kv_heads, dim, dtype=jnp.float32, seed=0):
  rng = np.random.default_rng(seed)
  shapes = [(1, n, heads, dim), *[(1, m, kv_heads, dim)] * 2]
  arrays = [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]
  do = jnp.asarray(rng.normal(size=shapes[0]), dtype)
  return *arrays, do


def check(q, k, v, do, ids=None, cap=None, rtol=2e-5):
  """Compare the emulated kernels with the float64 reference."""
  scale = q.shape[-1] ** -0.5
  emulated = Emulated(q, k, v, ids, scale, cap)
  options = dict(segment_ids=ids, logit_cap=cap)
  want = reference_attention(q, k, v, **options)
  out, lse = emulated.forward()
  n, dim = q.shape[1], q.shape[3]
  close = lambda a, b: np.testing.assert_allclose(  # noqa: E731
    np.asarray(a, np.float64), b, rtol=0, atol=rtol * max(1, np.abs(b).max())
  )
  close(out[:, :n, :, :dim], want.out)
  empty = np.isinf(want.lse)
  close(lse[:, :, :n] / tiles.LOG2E, np.where(empty, 0, want.lse))
  got = emulated.backward(out, lse, do)
  jax.tree.map(close, got, tuple(reference_gradients(q, k, v, do, **options)))
  return emulated


@pytest.mark.parametrize(
  ('n', 'm', 'heads', 'kv_heads', 'dim', 'cap'),
  [
    (130, 70, 2, 1, 72, 1.5),  # tails of a tile, of a step and of head_dim
    pytest.param(1, 257, 2, 1, 16, None, marks=pytest.mark.slow),
    pytest.param(300, 300, 4, 2, 128, None, marks=pytest.mark.slow),
  ],
)
def test_tiles_in_the_kernels_order(n, m, heads, kv_heads, dim, cap):
  check(*inputs(n, m, heads, kv_heads, dim), cap=cap)


def test_segments_are_skipped_and_empty_rows_are_zero():
  n = 400
  ids = np.repeat([0, 1, 2, -1], [150, 170, 60, 20])
  got = check(*inputs(n, n, 1, 1, 16), ids=jnp.asarray(ids[None], jnp.int32))
  # Steps of 128 keys of the four tiles, by two warpgroups; all would be 32.
  assert got.visited == 2 * (2 + 3 + 2 + 0)
  out, lse = got.forward()
  assert not np.any(out[:, 380:])
  assert not np.any(lse[:, :, 380:])


@pytest.mark.slow
def test_bfloat16():
  check(*inputs(70, 130, 1, 1, 64, jnp.bfloat16), cap=2.0, rtol=2e-2)


@pytest.mark.slow
@settings(
  max_examples=25, deadline=None, suppress_health_check=list(HealthCheck)
)
@given(
  n=st.integers(1, 400),
  dim=st.sampled_from([8, 16, 64, 72, 80, 88, 128]),
  groups=st.sampled_from([1, 2]),
  cap=st.sampled_from([None, 2.0]),
  cuts=st.lists(st.integers(-1, 4), min_size=1, max_size=6),
  sort=st.booleans(),
)
def test_any_shape(n, dim, groups, cap, cuts, sort):
  ids = np.resize(np.repeat(cuts, 40), n)
  ids = jnp.asarray((np.sort(ids) if sort else ids)[None], jnp.int32)
  check(*inputs(n, n, groups, 1, dim, seed=n), ids=ids, cap=cap)


def test_visited_steps_hold_all_pairs_that_meet():
  rng = np.random.default_rng(0)
  ids = np.sort(rng.integers(-1, 6, size=(3, 512)), axis=1)
  ranges = np.asarray(visited(ids, ids, 128, 64))
  meet = (ids[:, :, None] == ids[:, None]) & (ids[:, None] >= 0)
  meet = meet.reshape(3, 4, 128, 8, 64).any((2, 4))
  for i, j, k in np.argwhere(meet):
    first, end = ranges[i, j]
    assert first <= k < end
  nothing = np.full((3, 512), -1)
  assert np.ptp(visited(nothing, nothing, 128, 64)) == 0


def test_padding_goes_to_the_next_multiple_of_16_and_no_further():
  for dim, wide in ((64, 64), (72, 80), (80, 80), (88, 96), (128, 128)):
    x = jax.ShapeDtypeStruct((1, 9, 1, dim), jnp.bfloat16)
    assert jax.eval_shape(flash_gpu.pad, x).shape == (1, 16, 1, wide)
  padded = pad(np.ones((1, 9, 1, 72), np.float32))
  assert padded[:, :9, :, :72].all()
  assert padded.sum() == 9 * 72


@pytest.mark.parametrize(
  ('change', 'reason'),
  [
    (dict(platform='cpu'), 'needs a GPU, found cpu'),
    (dict(capability=(8, 0)), r'compute capability 9.0\), found 8.0'),
    (dict(capability=None), 'found unknown'),
    (dict(jax=(0, 10, 2)), 'needs jax 0.12.0, found 0.10.2'),
    (dict(dtype='float32'), 'needs bfloat16, found float32'),
    (dict(head_dim=136), 'head_dim up to 128, found 136'),
    (dict(masked=True), 'takes no mask'),
  ],
)
def test_refusals(change, reason):
  assert flash_gpu.refuse(SPEC) is None
  found = flash_gpu.refuse(dataclasses.replace(SPEC, **change))
  assert found is not None
  assert re.search(reason, found)
