"""Pool tokens by attention, and classify what comes out (V-JEPA, V-JEPA 2)."""

import math
from typing import Literal

import jax
from flax import linen as nn

from vfm_jax.nn import layers
from vfm_jax.nn.transformer import Block, Stack
from vfm_jax.ops.attention import attention

# Where the self-attention blocks stand: on the pooled 'queries' after the
# cross-attention (V-JEPA, arXiv:2404.08471), or on all 'tokens' before it
# (V-JEPA 2, arXiv:2506.09985).
Side = Literal['queries', 'tokens']


class CrossAttention(nn.Module):
  """Let queries attend to tokens; there is no projection of the output.

  Attributes:
    heads: number of heads.
    impl: attention implementation, see `ops.attention`.
    dtype: compute type.
    kernel_init: initialiser of the kernels.
  """

  heads: int
  impl: str = 'auto'
  dtype: layers.Dtype = 'float32'
  kernel_init: nn.initializers.Initializer = layers.xavier_uniform()

  @nn.compact
  def __call__(self, q: jax.Array, x: jax.Array) -> jax.Array:
    """Return [B, Q, D] of queries q [B, Q, D] and tokens x [B, N, D]."""
    dim = x.shape[-1]
    if dim % self.heads:
      raise ValueError(
        f'expected a width that the number of heads divides, found width '
        f'{dim} and {self.heads} heads; change `heads` of the pooler'
      )
    shared = dict(dtype=self.dtype, kernel_init=self.kernel_init)
    q = layers.Dense(dim, name='q', **shared)(q)
    kv = layers.Dense(2 * dim, name='kv', **shared)(x)
    k, v = kv[..., :dim], kv[..., dim:]
    q, k, v = (
      y.reshape(*y.shape[:2], self.heads, dim // self.heads) for y in (q, k, v)
    )
    return attention(q, k, v, impl=self.impl).reshape(*q.shape[:2], dim)


class AttentivePooler(nn.Module):
  """Pool tokens with learned queries.

  q1 = q0 + A(q0, LN(x)), q2 = q1 + MLP(LN(q1)) with learned q0, which is not
  normalised; `depth` - 1 self-attention blocks go with it.

  Attributes:
    heads: number of heads.
    queries: number of learned queries.
    depth: 1 for the cross-attention alone.
    side: see `Side`.
    complete: False leaves out the norms, the sums and the MLP: A(q0, x).
    mlp_ratio: hidden features of the MLPs over the width (rounded down).
    norm_eps: epsilon of the LayerNorms.
    impl: attention implementation, see `ops.attention`.
    dtype: compute type; parameters are float32.
  """

  heads: int = 16
  queries: int = 1
  depth: int = 1
  side: Side = 'tokens'
  complete: bool = True
  mlp_ratio: float = 4.0
  norm_eps: float = 1e-5
  impl: str = 'auto'
  dtype: Literal['float32', 'bfloat16', 'float16'] = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Return [B, queries, D] of tokens x [B, N, D]."""
    dim = x.shape[-1]
    x = x.astype(self.dtype)
    if self.side == 'tokens':
      x = self._blocks(x)
    q = self.param('query_tokens', _normal(1), (self.queries, dim))
    q = q.astype(self.dtype)[None].repeat(len(x), 0)
    cross = CrossAttention(
      self.heads, self.impl, self.dtype, _normal(1), name='xattn'
    )
    if not self.complete:
      q = cross(q, x)
    else:
      mlp = layers.Mlp(
        int(dim * self.mlp_ratio),
        self.dtype,
        _normal(1),
        out_init=_normal(2),
        name='mlp',
      )
      norms = [
        layers.LayerNorm(self.norm_eps, self.dtype, name=f'norm{i}')
        for i in (1, 2)
      ]
      q = q + cross(q, norms[0](x))
      q = q + mlp(norms[1](q))
    return self._blocks(q) if self.side == 'queries' else q

  def _blocks(self, x):
    """Apply the self-attention blocks; none for a depth of 1."""
    if self.depth == 1:
      return x
    # The cross-attention is layer 1 in the scale of the residual branches.
    blocks = tuple(
      Block(
        heads=self.heads,
        mlp_width=int(x.shape[-1] * self.mlp_ratio),
        qkv_bias='full',
        norm_eps=self.norm_eps,
        impl=self.impl,
        dtype=self.dtype,
        kernel_init=_normal(1),
        out_init=_normal(2 * layer),
      )
      for layer in range(2, self.depth + 1)
    )
    stack = Stack(self.depth - 1, blocks, name='stack')
    nn.share_scope(self, stack)  # parameters are pooler/blocks_0/...
    return stack(x)[0]


class AttentiveClassifier(nn.Module):
  """Classify tokens by a linear layer on the pooled query.

  Attributes:
    num_classes: number of classes.
    pooler: makes one vector of all tokens; the fields say how.
    dtype: compute type of the linear layer.
  """

  num_classes: int
  pooler: AttentivePooler = AttentivePooler()
  dtype: Literal['float32', 'bfloat16', 'float16'] = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Return logits [B, num_classes] of tokens x [B, N, D]."""
    if self.pooler.queries != 1:
      raise ValueError(
        'a classifier reads one query, found `pooler.queries` '
        f'{self.pooler.queries}'
      )
    pooled = self.pooler(x)[:, 0]
    return layers.Dense(
      self.num_classes,
      dtype=self.dtype,
      kernel_init=_normal(1),
      name='linear',
    )(pooled)


def _normal(over: float) -> nn.initializers.Initializer:
  """Return a normal initialiser of 0.02 / sqrt(over)."""
  return layers.trunc_normal(0.02 / math.sqrt(over), 2.0)
