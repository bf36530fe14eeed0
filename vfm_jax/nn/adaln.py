"""Condition transformer blocks by adaptive LayerNorms (adaLN-Zero, DiT).

Peebles & Xie 2022 (arXiv:2212.09748), section 3. Conditioning vectors are
[B, F, D], float32: F is 1 where an example has one of them, or the number of
token slices in time, each with its own.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from vfm_jax import sharding
from vfm_jax.nn import layers
from vfm_jax.nn.transformer import Attention
from vfm_jax.ops import positions
from vfm_jax.ops.tokens import Grid

Layout = Literal['joint', 'factorised']


class Context(flax.struct.PyTreeNode):
  """Hold what conditions every block.

  Attributes:
    c: f32 [B, F, D], the sum of the embeddings of time and label.
    t_embed: f32 [B, F, D], the embedding of time alone.
    tau: int32 [B] noise level, 0 (clean) to 999; None if it was not given.
    keys: one random key an example [B], the same in all blocks; None, as in
      evaluation and sampling, for no randomness.
    shared: what `Hooks.prepare` returned.
    grid: (T', H', W') of the tokens; static.
  """

  c: jax.Array
  t_embed: jax.Array | None = None
  tau: jax.Array | None = None
  keys: jax.Array | None = None
  shared: Any = None
  grid: Grid = flax.struct.field(pytree_node=False, default=(1, 1, 1))

  def prepared(self, name: str) -> Any:
    """Return what `Hooks.prepare` returned by a name.

    Raises:
      ValueError: there is nothing of this name.
    """
    found = self.shared if isinstance(self.shared, Mapping) else {}
    if name not in found:
      raise ValueError(
        f'a hook of `denoiser.hooks` needs {name!r}, which '
        f'`denoiser.hooks.prepare` did not make, found {sorted(found)}; take '
        'the hooks that `models.switch.switch` or `models.prompts.dmp` returns'
      )
    return found[name]


@dataclasses.dataclass(frozen=True)
class Hooks:
  """Change what goes into each block.

  A hook is a function, or a Linen module of which each block gets its own
  copy (parameters blocks_i/token_hook, blocks_i/mask_hook). Modules may sow
  per-layer values into the collection 'aux', see `transformer.stack_sown`. A
  block computes

      x = token(layer, x, context)
      m = mask(layer, x, context)
      x = block(m * x) + (1 - m) * x

  Attributes:
    token: (layer, x [B, N, D], context) -> [B, N, D].
    mask: (layer, x [B, N, D], context) -> m, broadcastable to [B, N, D], or
      None for no mask, as the static fields of the hook decide.
    prepare: (context, embed_time) -> arrays, called once before the blocks
      for what they share (as a module: parameters prepare_hook); the result
      is `Context.shared`. embed_time maps times [K] to f32 [K, D].
    prefix: tokens of zeros that are put in front of the others for `token` to
      fill, and dropped after the last block.
  """

  token: Callable[..., jax.Array] | None = None
  mask: Callable[..., jax.Array | None] | None = None
  prepare: Callable[..., Any] | None = None
  prefix: int = 0


def own(
  parent: nn.Module, hook: Callable[..., Any], name: str
) -> Callable[..., Any]:
  """Return a hook, a module as the submodule `name` of `parent`."""
  if isinstance(hook, nn.Module):
    return hook.clone(parent=parent, name=name)
  return hook


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
  """Return x (1 + scale) + shift for x [B, N, D], the others [B, F, D]."""
  return per_slice(lambda x, a, b: x * (1 + b) + a, x, shift, scale)


def per_slice(
  fn: Callable[..., jax.Array], x: jax.Array, *vectors: jax.Array
) -> jax.Array:
  """Apply fn(x, *vectors) with each vector [B, F, D] repeated over its tokens.

  Args:
    fn: elementwise function.
    x: [B, N, D]; F divides N, and tokens are time-major.
    *vectors: [B, F, D].
  """
  b, n, d = x.shape
  f = vectors[0].shape[1]
  if f == 1:  # cutting makes copies, on CPU 4 % of a training step
    return fn(x, *vectors)
  cut = x.reshape(b, f, n // f, d)
  return fn(cut, *(v[:, :, None] for v in vectors)).reshape(b, n, d)


def by_rows(x: jax.Array) -> jax.Array:
  """Return x [B, ...], cut over the batch alone.

  Vectors that condition tokens are small: without a word the compiler would
  rather move them than the parameters they are multiplied by.
  """
  return sharding.constrain(x, 'batch', *(None,) * (x.ndim - 1))


class TimeEmbed(nn.Module):
  """Embed diffusion times: sinusoids, fc1, SiLU, fc2.

  Attributes:
    width: features of the embedding.
    features: number of sinusoids.
  """

  width: int
  features: int = 256

  @nn.compact
  def __call__(self, t: jax.Array) -> jax.Array:
    """Return f32 [..., width] of times [...], which nothing scales."""
    shared: dict[str, Any] = dict(kernel_init=nn.initializers.normal(0.02))
    h = by_rows(positions.time_features(t, self.features))
    h = by_rows(layers.Dense(self.width, name='fc1', **shared)(h))
    return by_rows(
      layers.Dense(self.width, name='fc2', **shared)(jax.nn.silu(h))
    )


class LabelEmbed(nn.Module):
  """Look class labels up in a table.

  Attributes:
    rows: number of classes, and one for the null label where there is one.
    width: features of the embedding.
  """

  rows: int
  width: int

  @nn.compact
  def __call__(self, y: jax.Array) -> jax.Array:
    """Return f32 [B, width] of int32 [B]; NaN for a label without a row."""
    shape = (self.rows, self.width)
    table = self.param('table', nn.initializers.normal(0.02), shape)
    return by_rows(jnp.take(table, y, axis=0, mode='fill'))


class AdaLNBlock(nn.Module):
  """Add gated attention and a gated MLP, each on a modulated LayerNorm.

  All modulations are zero at first, so that the block is the identity.

  Attributes:
    heads: number of heads.
    mlp_width: hidden features of the MLP.
    attention: 'joint' attends over all tokens of a video. 'factorised'
      attends over space, then over time with further parameters (attn_time
      and ada_time), then comes the MLP. Both halves are in one block, so
      that all blocks are equal: it scans, and an image model's parameters
      are a subset whose outputs it keeps, frame by frame, while the gate of
      attn_time is zero.
    hooks: see `Hooks`.
    mixer: makes the module (parameters mixer) that takes the place of the
      attention over space, with its other fields: maps [B, H, W, D] to such
      maps; see `nn.mixer.Mixing`. None attends (parameters attn).
    norm_eps: epsilon of the LayerNorms.
    impl: attention implementation, see `ops.attention`.
    dtype: compute type of tokens.
  """

  heads: int
  mlp_width: int
  attention: Layout = 'joint'
  hooks: Hooks = Hooks()
  mixer: Callable[..., nn.Module] | None = None
  norm_eps: float = 1e-6
  impl: str = 'auto'
  dtype: layers.Dtype = 'float32'

  @nn.compact
  def __call__(
    self, x: jax.Array, context: Context, layer: int | jax.Array = 0
  ) -> jax.Array:
    """Return x [B, N, D] after the block.

    Args:
      x: [B, N, D].
      context: the conditioning.
      layer: number of the block, for the hooks; it may be traced.
    """
    if self.hooks.token is not None:
      token = own(self, self.hooks.token, 'token_hook')
      x = token(layer, x, context).astype(x.dtype)
    if self.hooks.mask is None:
      return self._update(x, context)
    m = own(self, self.hooks.mask, 'mask_hook')(layer, x, context)
    if m is None:
      return self._update(x, context)
    inside = self._update((m * x).astype(x.dtype), context)
    return (inside + (1 - m) * x).astype(x.dtype)

  def _update(self, x, context):
    shared: dict[str, Any] = dict(
      qkv_bias='full', impl=self.impl, dtype=self.dtype
    )
    if self.mixer is None:
      attn = Attention(self.heads, name='attn', **shared)
    else:
      attn = self._over_map(context.grid)
    mlp = layers.Mlp(self.mlp_width, self.dtype, gelu='tanh', name='mlp')
    ada = _modulation(context.c, 6, 'ada')
    if self.attention == 'joint':
      x = self._add(x, attn, *ada[:3])
    else:
      time = Attention(self.heads, name='attn_time', **shared)
      slices = context.grid[0]
      x = self._add(x, lambda h: _over_space(attn, h, slices), *ada[:3])
      ada_time = _modulation(context.c, 3, 'ada_time')
      x = self._add(x, lambda h: _over_time(time, h, slices), *ada_time)
    return self._add(x, mlp, *ada[3:])

  def _over_map(self, grid):
    """Return the mixer as a function of tokens [B, N, D]."""
    assert self.mixer is not None
    mixer: Any = self.mixer(impl=self.impl, dtype=self.dtype, name='mixer')

    def mix(h):
      return mixer(h.reshape(-1, *grid[1:], h.shape[-1])).reshape(h.shape)

    return mix

  def _add(self, x, branch, shift, scale, gate):
    h = layers.LayerNorm(self.norm_eps, affine=False)(x)
    h = branch(modulate(h, shift, scale).astype(self.dtype))
    return x + per_slice(jnp.multiply, h, gate).astype(x.dtype)


class FinalLayer(nn.Module):
  """Turn tokens into outputs: modulated LayerNorm, zero-initialised linear.

  Attributes:
    features: outputs of a token.
    norm_eps: epsilon of the LayerNorm.
    dtype: compute type of tokens.
  """

  features: int
  norm_eps: float = 1e-6
  dtype: layers.Dtype = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
    """Return [B, N, features] of x [B, N, D] and c [B, F, D]."""
    h = layers.LayerNorm(self.norm_eps, affine=False)(x)
    h = modulate(h, *_modulation(c, 2, 'ada')).astype(self.dtype)
    zeros = nn.initializers.zeros
    return layers.Dense(
      self.features, dtype=self.dtype, kernel_init=zeros, name='linear'
    )(h)


def _modulation(c, parts, name):
  """Return `parts` vectors [B, F, D] of c, zero at first."""
  zeros = nn.initializers.zeros
  ada = layers.Dense(parts * c.shape[-1], kernel_init=zeros, name=name)
  return jnp.split(by_rows(ada(by_rows(jax.nn.silu(c)))), parts, axis=-1)


def _over_space(attend, x, slices):
  b, n, d = x.shape
  return attend(x.reshape(b * slices, n // slices, d)).reshape(b, n, d)


def _over_time(attend, x, slices):
  b, n, d = x.shape
  x = x.reshape(b, slices, n // slices, d).swapaxes(1, 2)
  x = attend(x.reshape(-1, slices, d)).reshape(b, n // slices, slices, d)
  return x.swapaxes(1, 2).reshape(b, n, d)
