"""Build the pre-norm transformer: Attention, Block and Stack."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from vfm_jax import sharding, trees
from vfm_jax.nn import layers
from vfm_jax.nn.adapters import Adapter
from vfm_jax.ops import linear, rope
from vfm_jax.ops.attention import attention
from vfm_jax.ops.attention_spec import RESIDUAL
from vfm_jax.ops.keys import fold

QkvBias = Literal['none', 'qv', 'full']
Remat = Literal['none', 'full', 'dots']
# The MLP of a block: fc1, GELU, fc2; or gated, of the width that is given or
# of 2/3 of it, rounded up to a multiple of 8, which has about as many weights.
Gate = Literal['none', 'full', 'two_thirds']

# exp(4.6052) = 100: the largest logit scale of cosine attention.
_MAX_LOG_SCALE = 4.6052


class Placement(flax.struct.PyTreeNode):
  """Say where tokens are and which of them see each other.

  Attributes:
    rotation: turns queries and keys, see `ops.rope`; None turns nothing.
    mask: bool, broadcastable to [B, H, N, N], True = may attend; None for all.
  """

  rotation: rope.Rotation | None = None
  mask: jax.Array | None = None


class Attention(nn.Module):
  """Attend jointly over all tokens, with one fused qkv kernel [D, 3, H, D/H].

  Asked for the collection 'attention', it sows `first_query`, f32 [B, N]: what
  the first token attends to, the mean over the heads.

  Attributes:
    heads: number of heads.
    qkv_bias: 'none'; 'qv' learns a bias of q and of v (VideoMAE: the one of k
      has no effect on the softmax and is zero); 'full' learns all three.
    cosine: normalise q and k and learn the logit scale of each head
      (VideoMAE V2 option).
    impl: attention implementation, see `ops.attention`.
    dtype: compute type.
    kernel_init: initialiser of the kernels.
    out_init: initialiser of the last one; None for `kernel_init`.
  """

  heads: int
  qkv_bias: QkvBias = 'qv'
  cosine: bool = False
  impl: str = 'auto'
  dtype: layers.Dtype = 'float32'
  kernel_init: nn.initializers.Initializer = layers.xavier_uniform()
  out_init: nn.initializers.Initializer | None = None

  @nn.compact
  def __call__(
    self, x: jax.Array, placement: Placement | None = None
  ) -> jax.Array:
    """Return [B, N, D] of x [B, N, D]."""
    placement = placement or Placement()
    b, n, dim = x.shape
    if dim % self.heads:
      raise ValueError(
        f'expected a width that the number of heads divides, found width '
        f'{dim} and {self.heads} heads; change `width` or `heads`'
      )
    head_dim = dim // self.heads
    q, k, v = QKV(
      self.heads,
      self.qkv_bias == 'full',
      self.dtype,
      self.kernel_init,
      name='qkv',
    )(x)
    if self.qkv_bias == 'qv':
      zeros, shape = nn.initializers.zeros, (self.heads, head_dim)
      q_bias = self.param('q_bias', zeros, (dim,))
      v_bias = self.param('v_bias', zeros, (dim,))
      q = q + q_bias.astype(q.dtype).reshape(shape)
      v = v + v_bias.astype(v.dtype).reshape(shape)
    if placement.rotation is not None:
      q, k = (rope.rotate(y, placement.rotation) for y in (q, k))
    scale = None
    if self.cosine:
      start = nn.initializers.constant(math.log(10.0))
      log_scale = self.param('log_scale', start, (self.heads,))
      factor = jnp.exp(jnp.minimum(log_scale, _MAX_LOG_SCALE))
      q = (layers.unit(q) * factor[:, None]).astype(q.dtype)
      k = layers.unit(k).astype(k.dtype)
      scale = 1.0
    asked = self.is_mutable_collection('attention')
    if asked and not self.is_initializing():
      self.sow('attention', 'first_query', _first_query(q, k, scale))
    out = attention(q, k, v, mask=placement.mask, scale=scale, impl=self.impl)
    out_init = self.out_init or self.kernel_init
    return layers.Dense(
      dim, dtype=self.dtype, kernel_init=out_init, name='proj'
    )(out.reshape(b, n, dim))


class QKV(nn.Module):
  """Project to queries, keys and values, three times [B, N, H, D/H].

  One parameter [D, 3, H, D/H], initialised as a matrix [D, 3D] and used as
  three products: on CPU the backward pass of one product with three outer
  axes takes half as long again. Merging (H, D/H) keeps a cut over heads.
  """

  heads: int
  use_bias: bool
  dtype: layers.Dtype
  kernel_init: nn.initializers.Initializer

  @nn.compact
  def __call__(self, x: jax.Array) -> list[jax.Array]:
    """Return queries, keys and values of x [B, N, D]."""
    dim = x.shape[-1]
    shape = (3, self.heads, dim // self.heads)

    def init(rng, shape):
      return self.kernel_init(rng, (dim, 3 * dim)).reshape(shape)

    kernel = self.param('kernel', init, (dim, *shape))
    x, kernel = promote_dtype(x, kernel, dtype=self.dtype)
    out = [
      linear.matmul(x, kernel[:, i].reshape(dim, dim)).reshape(
        *x.shape[:-1], *shape[1:]
      )
      for i in range(3)
    ]
    if self.use_bias:
      bias = self.param('bias', nn.initializers.zeros, shape)
      out = [y + bias[i].astype(y.dtype) for i, y in enumerate(out)]
    lead = ('batch', 'tokens')[: x.ndim - 1]
    return [sharding.constrain(y, *lead, 'heads', None) for y in out]


class Block(nn.Module):
  """Add attention and an MLP to x, each on its LayerNorm.

  Attributes:
    heads: number of heads.
    mlp_width: hidden features of the MLP.
    qkv_bias: see `Attention`.
    cosine: see `Attention`.
    layer_scale: initial value of learned per-channel factors of both
      branches; 0 for none.
    norm_eps: epsilon of the LayerNorms.
    gelu: see `nn.layers.Mlp`.
    impl: attention implementation.
    dtype: compute type.
    kernel_init: initialiser of the kernels.
    out_init: initialiser of the last kernel of each branch; None for
      `kernel_init`. A gated MLP has its own, `kernel_init`.
    gate: see `Gate`.
    adapter: width of an `nn.adapters.Adapter` beside the MLP; 0 for none.
  """

  heads: int
  mlp_width: int
  qkv_bias: QkvBias = 'qv'
  cosine: bool = False
  layer_scale: float = 0.0
  norm_eps: float = 1e-6
  gelu: layers.Gelu = 'erf'
  impl: str = 'auto'
  dtype: layers.Dtype = 'float32'
  kernel_init: nn.initializers.Initializer = layers.xavier_uniform()
  out_init: nn.initializers.Initializer | None = None
  gate: Gate = 'none'
  adapter: int = 0

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    placement: Placement | None = None,
    layer: int | jax.Array = 0,
    *,
    drop_path: float | jax.Array = 0.0,
    keys: jax.Array | None = None,
  ) -> jax.Array:
    """Return x [B, N, D] after the block.

    Args:
      x: [B, N, D].
      placement: where the tokens are and what they see; None for anywhere
        and everything.
      layer: number of the block, which changes nothing.
      drop_path: probability to drop each branch.
      keys: one key an example [B]; None drops nothing.
    """
    del layer
    shared: dict[str, Any] = dict(
      dtype=self.dtype, kernel_init=self.kernel_init
    )
    attn = Attention(
      self.heads,
      self.qkv_bias,
      self.cosine,
      self.impl,
      out_init=self.out_init,
      name='attn',
      **shared,
    )
    if self.gate == 'none':
      mlp = layers.Mlp(
        self.mlp_width,
        gelu=self.gelu,
        out_init=self.out_init,
        name='mlp',
        **shared,
      )
    else:
      width = gated_width(self.mlp_width, self.gate)
      mlp = layers.GatedMlp(width, name='mlp', **shared)
    branches = (lambda h: attn(h, placement), mlp)
    for i, branch in enumerate(branches, 1):
      norm = layers.LayerNorm(self.norm_eps, self.dtype, name=f'norm{i}')
      h = norm(x)
      y = branch(h)
      if self.adapter and i == 2:
        y = y + Adapter(self.adapter, dtype=self.dtype, name='adapter')(h)
      if self.layer_scale > 0:
        start = nn.initializers.constant(self.layer_scale)
        gamma = self.param(f'gamma_{i}', start, (x.shape[-1],))
        y = y * gamma.astype(y.dtype)
      if keys is not None:
        branch_keys = fold(keys, i)
        y = layers.drop_path(y, drop_path, branch_keys)
      x = x + y
    return x


def gated_width(width: int, gate: Gate) -> int:
  """Return the width of both hidden layers of a gated MLP, see `Gate`."""
  return width if gate == 'full' else -(-int(2 * width / 3) // 8) * 8


class Stack(nn.Module):
  """Apply `depth` blocks; their parameters are in the parent's scope.

  Unrolled, the parameters are blocks_0/..., blocks_1/...; scanned, they are
  blocks/... with a leading axis of layers. `stack_blocks` and
  `unstack_blocks` change one into the other.

  A block may be conditioned: with `cond` it is called as
  block(x, cond, layer), and each block gets the same `cond`; for a `Block` it
  is a `Placement`.

  Attributes:
    depth: number of blocks.
    block: the block, a template that is cloned: x [B, N, D] -> [B, N, D]; or
      one for each layer, where their shapes differ: these do not scan. What a
      block sows into the collection 'aux' is kept for every layer.
    drop_path: rate of the last block; it grows linearly from 0.
    scan: compile one block and loop over it.
    remat: what the backward pass computes again: 'none', the 'full' block,
      or all but the 'dots' (products with weights, and what the backward pass
      of an attention kernel needs).
  """

  depth: int
  block: nn.Module | tuple[nn.Module, ...]
  drop_path: float = 0.0
  scan: bool = False
  remat: Remat = 'none'

  def setup(self):
    """Make the submodules (called by Flax)."""
    if isinstance(self.block, tuple):
      templates = self.block
      if self.scan or len(templates) != self.depth:
        raise ValueError(
          f'{len(templates)} blocks that may differ need a depth of as many '
          f'and `scan` False, found a depth of {self.depth} and {self.scan}'
        )
    else:
      templates = (self.block,) * (1 if self.scan else self.depth)
    blocks = [t.clone(parent=None, name=None) for t in templates]
    self.blocks: Any = blocks[0] if self.scan else blocks

  def __call__(
    self,
    x: jax.Array,
    keys: jax.Array | None = None,
    taps: Sequence[int] = (),
    cond: Any = None,
  ) -> tuple[jax.Array, list[jax.Array]]:
    """Apply the blocks.

    Args:
      x: [B, N, D].
      keys: one key an example [B] for stochastic depth; None for none of it.
      taps: block numbers whose outputs are wanted too; negative ones count
        from the end.
      cond: arrays that condition the blocks; None for blocks that take none.

    Returns:
      The output [B, N, D] of the last block, and those of `taps`.
    """
    if any(not -self.depth <= i < self.depth for i in taps):
      raise ValueError(
        f'expected taps from {-self.depth} to {self.depth - 1} for a depth '
        f'of {self.depth}, found {tuple(taps)}'
      )
    rates = np.linspace(0, self.drop_path, self.depth, dtype=np.float32)
    if self.drop_path == 0:
      keys = None

    def apply(block, x, layer, rate, cond):
      args = () if cond is None else (cond, layer)
      # Parameters that are cut come to the tokens, and not the other way round.
      x = sharding.constrain(x, 'batch', 'tokens', 'embed')
      if keys is None:
        x = block(x, *args)
      else:
        x = block(x, *args, drop_path=rate, keys=fold(keys, layer))
      return sharding.constrain(x, 'batch', 'tokens', 'embed')

    if self.remat == 'dots':
      policies = jax.checkpoint_policies
      policy = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable,
        policies.save_only_these_names(RESIDUAL),
      )
      apply = nn.remat(apply, policy=policy, prevent_cse=not self.scan)
    elif self.remat == 'full':
      apply = nn.remat(apply, prevent_cse=not self.scan)

    if not self.scan:
      outputs = []
      for i, block in enumerate(self.blocks):
        x = apply(block, x, i, rates[i], cond)
        outputs.append(x)
      return x, [outputs[i] for i in taps]

    def step(block, x, layer, rate, cond) -> tuple[jax.Array, Any]:
      x = apply(block, x, layer, rate, cond)
      return x, x if taps else None

    # The annotation of `nn.scan` knows numbers only.
    in_axes: Any = (0, 0, nn.broadcast)
    loop = nn.scan(
      step,
      variable_axes={'params': 0, 'aux': 0, 'attention': 0},
      split_rngs={'params': True},
      in_axes=in_axes,
      length=self.depth,
    )
    x, outputs = loop(self.blocks, x, jnp.arange(self.depth), rates, cond)
    return x, [outputs[i] for i in taps]


def stack_blocks(params: Mapping[str, Any]) -> dict[str, Any]:
  """Turn blocks_0, blocks_1, ... into blocks with a leading axis of layers.

  Args:
    params: parameters; the blocks may be at any depth of the tree.
  """
  out, layers_of = {}, {}
  for name, value in params.items():
    if name.startswith('blocks_'):
      layers_of[int(name.removeprefix('blocks_'))] = value
    else:
      out[name] = stack_blocks(value) if isinstance(value, Mapping) else value
  if layers_of:
    ordered = [layers_of[i] for i in range(len(layers_of))]
    out['blocks'] = jax.tree.map(lambda *x: jnp.stack(x), *ordered)
  return out


def unstack_blocks(params: Mapping[str, Any]) -> dict[str, Any]:
  """Turn blocks with a leading axis of layers into blocks_0, blocks_1, ..."""
  out = {}
  for name, value in params.items():
    if name == 'blocks':
      depth = jax.tree.leaves(value)[0].shape[0]
      for i in range(depth):
        out[f'blocks_{i}'] = jax.tree.map(lambda x, i=i: x[i], value)
    else:
      out[name] = unstack_blocks(value) if isinstance(value, Mapping) else value
  return out


def rescale_residual(params: Mapping[str, Any]) -> dict[str, Any]:
  """Divide the last kernels of both branches of block l by sqrt(2 l), l >= 1.

  Applied to initial parameters, it keeps the variance of the sum from growing
  with the depth (BEiT, V-JEPA 2). In a gated MLP the value's kernel stands for
  the last one: the branch is linear in either.

  Args:
    params: parameters with unrolled or scanned blocks, at any depth.
  """

  def scale(path: str, x: jax.Array) -> jax.Array:
    if not re.search(r'(attn/proj|mlp/fc2)/kernel$', path):
      return x
    if trees.STACKED.search(path):
      layer = jnp.arange(1, len(x) + 1, dtype=x.dtype)[:, None, None]
    elif number := re.search(r'(?:^|/)blocks_(\d+)/', path):
      layer = int(number[1]) + 1
    else:
      return x
    return x / jnp.sqrt(2.0 * layer)

  return trees.map_with_path(scale, params)


def stack_sown(sown: Mapping[str, Any]) -> dict[str, jax.Array]:
  """Return what modules sowed, by name: [L, ...] in the order of the layers.

  A scanned and an unrolled stack give the same. What a module outside of the
  blocks sowed has L = 1.

  Args:
    sown: a collection, such as 'aux', after `Module.apply`.

  Raises:
    ValueError: a module sowed a name twice.
  """
  found: dict[str, list[jax.Array]] = {}
  leaves = trees.path_leaves(sown)
  # By number, so that block 10 comes after block 9.
  natural = lambda leaf: [  # noqa: E731
    int(part) if part.isdigit() else part
    for part in re.split(r'(\d+)', leaf[0])
  ]
  for path, value in sorted(leaves, key=natural):
    *_, name, number = path.split('/')
    if number != '0':
      raise ValueError(
        f'expected each module to sow {name!r} once, found '
        f'{path.removesuffix("/" + number)!r} twice'
      )
    value = value if trees.STACKED.search(path) else value[None]
    found.setdefault(name, []).append(value)
  return {name: jnp.concatenate(values) for name, values in found.items()}


def _first_query(q, k, scale) -> jax.Array:
  """Return the attention f32 [B, N] of the first token, over all heads."""
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  q, k = q[:, 0].astype(jnp.float32), k.astype(jnp.float32)
  logits = scale * jnp.einsum('bhd,bnhd->bhn', q, k)
  return jax.nn.softmax(logits, axis=-1).mean(1)
