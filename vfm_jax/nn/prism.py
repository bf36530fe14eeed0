"""Build the layers of VideoPrism (arXiv:2402.13217): block and pooling.

What differs from `nn.transformer.Block`: logits of attention are capped, norms
may stand in other places, and rows may be padding. Released LayerNorms store
their scale less one; ours is the sum (`convert_videoprism.py`).
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from vfm_jax.nn import layers
from vfm_jax.nn.transformer import QKV, Remat, Stack

NormPolicy = Literal['pre', 'primer_hybrid', 'post', 'post_skip']
Activation = Literal['gelu', 'relu']

# Logits where attention is masked. A row that may attend to nothing has only
# these, and so attends to all alike, as in the released code.
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def capped_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  cap: float = 0.0,
  mask: jax.Array | None = None,
) -> jax.Array:
  """Return softmax(cap tanh(q k^T / cap)) v over the heads.

  Logits and softmax are float32.

  Args:
    q: [B, N, H, D], already scaled.
    k: [B, M, H, D].
    v: [B, M, H, D].
    cap: bound on the logits; 0 for none.
    mask: bool, broadcastable to [B, H, N, M]; True = may attend. A query that
      may attend to nothing attends to all keys alike.

  Returns:
    [B, N, H, D] in the type of v.
  """
  logits = jnp.einsum(
    'bnhd,bmhd->bhnm', q, k, preferred_element_type=jnp.float32
  )
  if cap > 0:
    logits = cap * jnp.tanh(logits / cap)
  if mask is not None:
    logits = jnp.where(mask, logits, _MASKED)
  weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
  return jnp.einsum('bhnm,bmhd->bnhd', weights, v)


class PrismAttention(nn.Module):
  """Attend over all tokens, with biases and capped logits.

  Attributes:
    heads: number of heads.
    cap: bound on the logits; 0 for none.
    dtype: compute type.
  """

  heads: int
  cap: float = 50.0
  dtype: layers.Dtype = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Return [B, N, D] of x [B, N, D]; see `capped_attention` for `mask`."""
    init = nn.initializers.lecun_normal()
    q, k, v = QKV(self.heads, True, self.dtype, init, name='qkv')(x)
    out = capped_attention(
      q * q.shape[-1] ** -0.5, k, v, cap=self.cap, mask=mask
    )
    return layers.Dense(x.shape[-1], dtype=self.dtype, name='proj')(
      out.reshape(x.shape)
    )


class PrismMlp(nn.Module):
  """Apply fc1, an activation and fc2.

  Attributes:
    width: features of the hidden layer.
    activation: the exact 'gelu', or 'relu'.
    dtype: compute type.
  """

  width: int
  activation: Activation = 'gelu'
  dtype: layers.Dtype = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Return [..., D] of x [..., D]."""
    h = layers.Dense(self.width, dtype=self.dtype, name='fc1')(x)
    if self.activation == 'gelu':
      h = jax.nn.gelu(h, approximate=False)
    else:
      h = jax.nn.relu(h)
    return layers.Dense(x.shape[-1], dtype=self.dtype, name='fc2')(h)


class PrismBlock(nn.Module):
  """Add attention and an MLP to x.

  Attributes:
    heads: number of heads.
    mlp_width: hidden features of the MLP.
    cap: bound on the logits of attention; 0 for none.
    norm_policy: where the LayerNorms of a branch stand: 'pre', before it;
      'primer_hybrid', before and after it; 'post', after it; 'post_skip',
      after it is added.
    activation: of the MLP.
    dtype: compute type.
  """

  heads: int
  mlp_width: int
  cap: float = 50.0
  norm_policy: NormPolicy = 'pre'
  activation: Activation = 'gelu'
  dtype: layers.Dtype = 'float32'

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    cond: tuple[jax.Array, jax.Array] | None = None,
    layer: jax.Array | int = 0,
  ) -> jax.Array:
    """Return x [B, N, D] after the block.

    Args:
      x: [B, N, D].
      cond: where tokens may attend, bool broadcastable to [B, H, N, N], and
        which are real, bool [B, N]; the MLP adds nothing to the others. None
        for all.
      layer: number of the block; all compute alike.
    """
    del layer
    mask, valid = (None, None) if cond is None else cond

    def mlp(y):
      y = PrismMlp(self.mlp_width, self.activation, self.dtype, name='mlp')(y)
      return y if valid is None else y * valid[..., None].astype(y.dtype)

    attn = PrismAttention(self.heads, self.cap, self.dtype, name='attn')
    x = self._add(x, 'norm1', lambda y: attn(y, mask))
    return self._add(x, 'norm2', mlp)

  def _add(self, x, name, branch):
    def norm(y, suffix=''):
      return layers.LayerNorm(dtype=self.dtype, name=name + suffix)(y)

    policy = self.norm_policy
    y = branch(norm(x) if policy in ('pre', 'primer_hybrid') else x)
    if policy == 'primer_hybrid':
      y = norm(y, '_post')
    elif policy == 'post':
      y = norm(y)
    return norm(x + y) if policy == 'post_skip' else x + y


class PrismStack(nn.Module):
  """Apply blocks and a LayerNorm; a `Stack` that knows of padding.

  Attributes:
    depth: number of blocks.
    block: the block, a template that is cloned.
    final_norm: whether a LayerNorm follows.
    causal: tokens attend to themselves and what is before them.
    scan: compile one block and loop over it.
    remat: see `nn.transformer.Stack`.
  """

  depth: int
  block: PrismBlock
  final_norm: bool = True
  causal: bool = False
  scan: bool = False
  remat: Remat = 'none'

  @nn.compact
  def __call__(self, x: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """Return [B, N, D] of x [B, N, D]; `valid` bool [B, N] marks real ones."""
    stack = Stack(
      self.depth, self.block, scan=self.scan, remat=self.remat, name='stack'
    )
    nn.share_scope(self, stack)
    x, _ = stack(x, cond=self._masks(x, valid))
    if self.final_norm:
      x = layers.LayerNorm(dtype=self.block.dtype, name='norm')(x)
    return x

  def _masks(self, x, valid):
    if valid is None and not self.causal:
      return None
    b, n, _ = x.shape
    if valid is None:
      valid = jnp.ones((b, n), bool)
    mask = valid[:, None, None, :]
    if self.causal:
      # Padded queries, too, attend to nothing then.
      mask = mask & mask.swapaxes(-1, -2) & jnp.tril(jnp.ones((n, n), bool))
    return mask, valid


class AttentionPooler(nn.Module):
  """Pool tokens by attention of learned queries, and normalise.

  The query is scaled by r(d) = softplus(p_d) / (softplus(0) sqrt(D_head)), p
  learned and 0 at first, in place of 1 / sqrt(D_head); logits have no cap.

  Attributes:
    heads: number of heads.
    width: features of all heads together.
    dtype: compute type.
  """

  heads: int
  width: int
  dtype: layers.Dtype = 'float32'

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Return f32 [B, D] of tokens [B, N, D]."""
    b, _, dim = tokens.shape
    if self.width % self.heads:
      raise ValueError(
        'expected a width of the pooler that its heads divide, found width '
        f'{self.width} and {self.heads} heads'
      )

    def project(name, x):
      x = layers.Dense(self.width, dtype=self.dtype, name=name)(x)
      return x.reshape(*x.shape[:-1], self.heads, -1)

    init = nn.initializers.lecun_normal()
    query = self.param('query_token', init, (1, dim))
    q = project('q', jnp.broadcast_to(query, (b, 1, dim)))
    k, v = project('k', tokens), project('v', tokens)
    q = q * per_dim_scale(
      self.param('q_scale', nn.initializers.zeros, (q.shape[-1],))
    ).astype(q.dtype)
    out = capped_attention(q, k, v).reshape(b, self.width)
    out = layers.Dense(dim, dtype=self.dtype, name='proj')(out)
    return layers.LayerNorm(name='norm')(out)


def per_dim_scale(p: jax.Array) -> jax.Array:
  """Return softplus(p) / (softplus(0) sqrt(D)) of p [D]."""
  # As the released code writes 1 / softplus(0).
  return jax.nn.softplus(p) * (1.442695041 / p.shape[-1] ** 0.5)
