"""Mix affine experts: sum_e g_e (x W_e + b_e), in interchangeable ways.

Gates [B, E] say what an example takes of each expert, gates [B, N, E] what a
token does; 0 is nothing. All ways give the same up to roundings, and none drops
a token. An expert that nobody takes adds nothing and gets a gradient of 0.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from vfm_jax import sharding
from vfm_jax.ops import attention_mesh, linear

Impl = Literal['auto', 'dense', 'merged', 'grouped', 'parallel']

# Mesh axes that the batch may be cut over; the last one cuts experts too.
_BATCH = sharding.BATCH
_AXIS = _BATCH[-1]
_SEQ = 'seq'
# Rows of one expert that are multiplied at a time, on CPU.
_BLOCK = 128


def mix(
  x: jax.Array,
  kernel: jax.Array,
  bias: jax.Array,
  gates: jax.Array,
  *,
  top_k: int | None = None,
  impl: Impl = 'auto',
  alike: jax.Array | None = None,
) -> jax.Array:
  """Return the mixture of experts [B, N, F] in the type of x.

  Args:
    x: [B, N, D] tokens.
    kernel: [E, D, F] matrices of the experts.
    bias: [E, F].
    gates: f32 [B, E], the same for all tokens of an example, or f32 [B, N, E].
    top_k: the largest number of experts with a gate other than 0; all by
      default. What is beyond it does not count where tokens are sorted.
    impl: 'dense' computes every expert, as one product with all kernels.
      'merged' adds up the kernels of each example first, sum_e g_e W_e, so
      that any number of experts costs one product: gates must be [B, E].
      'grouped' sorts the (token, expert) pairs by expert, for one ragged
      product. 'parallel' does so where the experts are cut over the mesh axis
      `expert`: tokens go to their experts and come back, by two all-to-all
      exchanges with room for the worst case. 'auto' is 'merged' for gates
      [B, E], also on a mesh, for kernels are smaller than the tokens of many
      examples; for gates [B, N, E] it is 'parallel' where the mesh cuts
      experts, else 'dense'. The ragged product is `jax.lax.ragged_dot`, which
      has gradients and lowers for GPU and TPU (on CPU it would compute all
      experts for each row, and blocks of rows do it); the grouped kernel that
      ships with JAX is for TPU alone and asks for tile sizes.
    alike: bool [], whether all examples have the same gates [B, E], as at one
      step of a sampler: 'merged' then adds kernels up once. None does so for
      each example, without a branch.

  Raises:
    ValueError: shapes do not fit, or the implementation does not serve here.
  """
  kernel, bias = jnp.asarray(kernel), jnp.asarray(bias)
  b, n, width = x.shape
  experts = len(kernel)
  top_k = experts if top_k is None else top_k
  if (
    gates.shape not in ((b, experts), (b, n, experts))
    or kernel.shape[:2] != (experts, width)
    or bias.shape != (experts, kernel.shape[2])
    or not 1 <= top_k <= experts
  ):
    raise ValueError(
      'expected x [B, N, D], kernel [E, D, F], bias [E, F], gates [B, E] or '
      f'[B, N, E] and top_k of at most E; found {x.shape}, {kernel.shape}, '
      f'{bias.shape}, {gates.shape} and {top_k}'
    )
  if impl == 'auto':
    cut = jax.sharding.get_abstract_mesh().shape.get(_AXIS, 1) > 1
    impl = 'merged' if gates.ndim == 2 else 'parallel' if cut else 'dense'
  if impl == 'merged':
    return _merged(x, kernel, bias, gates, alike)
  if gates.ndim == 2:
    gates = jnp.broadcast_to(gates[:, None], (b, n, experts))
  if impl == 'dense':
    return _dense(x, kernel, bias, gates)
  if impl == 'parallel':
    return _parallel(x, kernel, bias, gates, top_k)
  if impl != 'grouped':
    raise ValueError(
      "expected `impl` 'auto', 'dense', 'merged', 'grouped' or 'parallel', "
      f'found {impl!r}'
    )
  rows = x.reshape(-1, width)
  out = _grouped(rows, kernel, bias, gates.reshape(-1, experts), top_k)
  return out.reshape(b, n, -1)


def _dense(x, kernel, bias, gates):
  b, n, _ = x.shape
  weighted = x[:, :, None] * gates[..., None].astype(x.dtype)
  kernel = kernel.reshape(-1, kernel.shape[2]).astype(x.dtype)
  out = linear.matmul(weighted.reshape(b, n, -1), kernel)
  return out + (gates @ bias).astype(x.dtype)


def _merged(x, kernel, bias, gates, alike):
  if gates.ndim != 2:
    raise ValueError(
      "`impl` 'merged' needs gates [B, E], one set for all tokens of an "
      f'example, found {gates.shape}'
    )

  # The merged kernels are large and cheap: the backward pass makes them anew.
  @jax.checkpoint
  def each(x, kernel, gates):
    merged = _merge(gates, kernel).astype(x.dtype)
    # The kernels of experts come here: they are fewer than merged ones.
    merged = sharding.constrain(merged, 'batch', None, None)
    return jnp.einsum('bnd,bdf->bnf', x, merged)

  def once(x, kernel, gates):
    merged = _merge(gates[:1], kernel)[0].astype(x.dtype)
    return linear.matmul(x, merged)

  if alike is None:
    out = each(x, kernel, gates)
  else:
    out = jax.lax.cond(alike, once, each, x, kernel, gates)
  return out + (gates @ bias).astype(x.dtype)[:, None]


def _merge(gates, kernel):
  """Return kernels [B, D, F] of gates [B, E] and kernel [E, D, F]."""
  if jax.sharding.get_abstract_mesh().size > 1:
    # Axes that are cut stay apart, as kernels have them.
    return jnp.einsum('be,edf->bdf', gates, kernel)
  # Gradients of matrices: CPUs are slow at sums over two axes.
  merged = gates @ kernel.reshape(len(kernel), -1)
  return merged.reshape(-1, *kernel.shape[1:])


def _grouped(x, kernel, bias, gates, top_k):
  """Mix for rows [T, D] with gates [T, E]."""
  weight, expert = jax.lax.top_k(gates, top_k)
  expert = expert.ravel()
  order = jnp.argsort(expert)
  rows, expert = order // top_k, expert[order]
  out = _by_expert(x[rows], kernel, bias, expert)
  out *= weight.ravel()[order][:, None].astype(out.dtype)
  return jnp.zeros((len(x), out.shape[1]), out.dtype).at[rows].add(out)


def _by_expert(x, kernel, bias, expert):
  """Return the outputs of rows [T, D] that are sorted by expert [T].

  Rows of an expert number E, which there is not, give 0.
  """
  experts, kernel = len(kernel), kernel.astype(x.dtype)
  sizes = jnp.zeros(experts, jnp.int32).at[expert].add(1, mode='drop')
  if attention_mesh.device().platform == 'cpu':
    out = _in_blocks(x, kernel, expert, sizes)
  else:
    out = jax.lax.ragged_dot(x, kernel, sizes)
  out += bias.astype(x.dtype).at[expert].get(mode='fill', fill_value=0)
  return jnp.where(expert[:, None] < experts, out, 0)


def _in_blocks(x, kernel, expert, sizes):
  """Be `ragged_dot` where that computes all experts for each row, as on CPU.

  Rows go into blocks of one expert each, which are filled up with zeros.
  """
  experts, size = len(kernel), min(_BLOCK, len(x))
  blocks = -(-sizes // size)
  count = len(x) // size + experts  # there are at most so many
  last = jnp.cumsum(blocks)
  place = jnp.arange(len(x)) - (jnp.cumsum(sizes) - sizes)[expert]
  slot = (last - blocks)[expert] * size + place
  slot = jnp.where(expert < experts, slot, count * size)
  rows = jnp.zeros((count * size, x.shape[1]), x.dtype)
  rows = rows.at[slot].set(x, mode='drop').reshape(count, size, -1)
  whose = jnp.searchsorted(last, jnp.arange(count), side='right')
  out = jax.vmap(linear.matmul)(rows, kernel[jnp.minimum(whose, experts - 1)])
  out = out.reshape(count * size, -1)
  return out.at[slot].get(mode='fill', fill_value=0)


def _parallel(x, kernel, bias, gates, top_k):
  mesh = jax.sharding.get_abstract_mesh()
  parts = mesh.shape.get(_AXIS, 1)
  batch = tuple(a for a in _BATCH if mesh.shape.get(a, 1) > 1)
  slots = math.prod(mesh.shape[a] for a in batch)
  tokens = _SEQ if mesh.shape.get(_SEQ, 1) > 1 else None
  b, n, _ = x.shape
  if (
    parts == 1
    or len(kernel) % parts
    or b % slots
    or n % mesh.shape.get(_SEQ, 1)
  ):
    raise ValueError(
      "`impl` 'parallel' needs a mesh whose axis `expert` is above 1 and "
      'divides the experts, and a batch and tokens that its axes divide; found '
      f'{len(kernel)} experts and {b} examples of {n} tokens on the mesh '
      f'{dict(mesh.shape)}; change `mesh` or `denoiser.hooks.mask.impl`'
    )

  def local(x, kernel, bias, gates):
    b, n, width = x.shape
    rows = x.reshape(b * n, width)
    gates = gates.reshape(b * n, -1)
    out = _exchange(rows, kernel, bias, gates, top_k, parts)
    return out.reshape(b, n, -1)

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(P(batch, tokens), P(_AXIS), P(_AXIS), P(batch, tokens)),
    out_specs=P(batch, tokens),
    check_vma=False,
  )(x, kernel, bias, gates)


def _exchange(x, kernel, bias, gates, top_k, parts):
  """Mix for this device's rows [T, D] and its E / parts experts."""
  own, width = len(kernel), x.shape[1]
  weight, expert = jax.lax.top_k(gates, top_k)
  expert = expert.ravel()
  order = jnp.argsort(expert)
  rows, expert = order // top_k, expert[order]
  # Rows for one device are together; each device has room for all there may
  # be: a row goes to a device once for each expert that it takes there.
  there = expert // own
  room = len(x) * min(top_k, own)
  first = jnp.searchsorted(there, jnp.arange(parts))
  slot = there * room + jnp.arange(len(there)) - first[there]

  def swap(values):
    values = values.reshape(parts, room, *values.shape[1:])
    values = jax.lax.all_to_all(values, _AXIS, 0, 0)
    return values.reshape(parts * room, *values.shape[2:])

  sent = jnp.zeros((parts * room, width), x.dtype).at[slot].set(x[rows])
  asked = jnp.full(parts * room, own).at[slot].set(expert % own)
  sent, asked = swap(sent), swap(asked)
  sort = jnp.argsort(asked)
  done = _by_expert(sent[sort], kernel, bias, asked[sort])
  done = swap(jnp.zeros_like(done).at[sort].set(done))[slot]
  done *= weight.ravel()[order][:, None].astype(done.dtype)
  return jnp.zeros((len(x), done.shape[1]), done.dtype).at[rows].add(done)
