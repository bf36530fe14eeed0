"""Patch a diffusion transformer with mixtures of prompts (DMP).

Ham et al. 2024 (arXiv:2405.17825): each block has learnable prompts, which a
gate, shared by all blocks, mixes for each example by its time and label. The
network itself stays as it was: prompts of zero add nothing.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from vfm_jax.nn import adaln, layers
from vfm_jax.ops import gating
from vfm_jax.ops.keys import fold

Mode = Literal['add', 'prepend']
Init = Literal['zero', 'random']

# What the gate is called in `Context.shared`.
SHARED = 'prompts'
# The least standard deviation of the noise of gates.
_MIN_STD = 0.01
_NO_HOOKS = adaln.Hooks()


def dmp(
  count: int,
  *,
  mode: Mode = 'add',
  kind: Literal['DMP', 'PT'] = 'DMP',
  top: float = 1.0,
  depth: int | None = None,
  init: Init = 'zero',
  base: adaln.Hooks = _NO_HOOKS,
) -> adaln.Hooks:
  """Return the hooks of a DiT that is patched with prompts.

  Further parameters are blocks_i/token_hook/prompt_tokens and, of the gate,
  prepare_hook/gate, prepare_hook/noise and prepare_hook/depth_scale. Those of
  `base.prepare`, if there are any, go to prepare_hook/base.

  Args:
    count: prompts a block, n; with 'add' the number of tokens.
    mode: 'add' prompt i to token i, or 'prepend' the prompts to the tokens,
      anew in each block.
    kind: 'DMP' weighs prompts by a gate; 'PT' is prompt tuning, without one.
    top: share of the prompts that get a weight: floor(top * n) of them.
    depth: the first blocks, which have prompts; all by default. What the
      other blocks hold, to be like these in a scanned stack, has no effect.
    init: 'zero' leaves the output as it is; 'random' is Xavier's uniform.
    base: hooks of the network that is patched.

  Raises:
    ValueError: no prompt gets a weight, `init` needs a `depth`, or `base` has
      a token hook or a prefix.
  """
  if count < 1 or not 1 <= int(top * count) <= count:
    raise ValueError(
      'expected `denoiser.hooks.count` of at least 1 and '
      '`denoiser.hooks.top` to leave 1 to that many of them, found '
      f'{count} and {top:g}'
    )
  if depth is not None and depth < 1:
    raise ValueError(
      f'expected `denoiser.hooks.depth` of at least 1 or None, found {depth}'
    )
  if init == 'random' and depth is None:
    raise ValueError(
      "`denoiser.hooks.init` 'random' needs `denoiser.hooks.depth`, the number "
      'of blocks, on which the range of the values depends; found None'
    )
  if base.token is not None or base.prefix:
    raise ValueError(
      'expected `denoiser.hooks.base` without a token hook and a prefix, '
      f'which the prompts take, found {base}'
    )
  prepare = base.prepare
  if kind == 'DMP':
    reads = 'c' if mode == 'add' else 't_embed'
    prepare = Gate(count, reads, init, base.prepare)
  return adaln.Hooks(
    token=Prompts(count, mode, kind == 'DMP', top, depth, init),
    mask=base.mask,
    prepare=prepare,
    prefix=count if mode == 'prepend' else 0,
  )


class Logits(flax.struct.PyTreeNode):
  """Hold what the gates of all layers share.

  Attributes:
    clean: f32 [B, n]; layer l has clean + l * slope.
    slope: f32 [n].
    std: f32 [B, n], of the noise in training.
  """

  clean: jax.Array
  slope: jax.Array
  std: jax.Array

  def at(self, layer: int | jax.Array) -> jax.Array:
    """Return the logits f32 [B, n] of a layer, without noise."""
    return self.clean + jnp.asarray(layer, jnp.float32) * self.slope


class Gate(nn.Module):
  """Score prompts by the conditioning; a `Hooks.prepare`.

  One linear layer of [u; l], with u the conditioning and l the number of the
  layer. The standard deviation of the noise is softplus(u W) + 0.01.

  Attributes:
    count: number of prompts n.
    reads: which embedding u is: that of time and label, or of time alone.
    start: see `dmp`, `init`.
    base: what else is to be prepared: it returns a mapping.
  """

  count: int
  reads: Literal['c', 't_embed'] = 'c'
  start: Init = 'zero'
  base: Callable[..., Any] | None = None

  @nn.compact
  def __call__(
    self,
    context: adaln.Context,
    embed_time: Callable[[jax.Array], jax.Array] | None = None,
  ) -> dict[str, Any]:
    """Return what `base` does, and `Logits` under 'prompts'.

    Raises:
      ValueError: an example has several times.
    """
    u = context.c if self.reads == 'c' else context.t_embed
    assert u is not None
    _, slices, width = u.shape
    if slices > 1:
      raise ValueError(
        'the gate of `denoiser.hooks` needs one time an example: expected '
        f'times [B], found [B, {slices}]'
      )
    u = u[:, 0]
    inner = _initialiser(self.start, width + 1 + self.count)
    gate = layers.Dense(self.count, kernel_init=inner, name='gate')
    slope = self.param('depth_scale', inner, (self.count,))
    noise = layers.Dense(
      self.count,
      use_bias=False,
      kernel_init=_initialiser(self.start, width + self.count),
      name='noise',
    )
    shared: Mapping[str, Any] = {}
    if self.base is not None:
      shared = self.base(context, embed_time)
    std = jax.nn.softplus(noise(u)) + _MIN_STD
    return {**shared, SHARED: Logits(gate(u), slope, std)}


class Prompts(nn.Module):
  """Give the tokens of a block its prompts; a `Hooks.token`.

  It sows into 'aux', for `objectives.balance`, zeros where a block has no
  prompts: `prompt_gates` f32 [B, n], the weights; `prompt_load` f32 [B, n],
  how likely each has one, which is 0 or 1 where no noise decides; and
  `prompt_drawn` f32 [], 1 where noise decides.

  Attributes:
    count: number of prompts n.
    mode: see `dmp`, and so the others.
    gated: weigh the prompts by the gate.
    top: share of the prompts that get a weight.
    depth: the first blocks, which have prompts; None for all.
    start: first values, see `dmp`, `init`.
  """

  count: int
  mode: Mode = 'add'
  gated: bool = True
  top: float = 1.0
  depth: int | None = None
  start: Init = 'zero'

  @nn.compact
  def __call__(
    self, layer: int | jax.Array, x: jax.Array, context: adaln.Context
  ) -> jax.Array:
    """Return the tokens [B, N, D] with prompts; N counts the prefix.

    Raises:
      ValueError: the number of prompts is not that of the tokens or of the
        prefix.
    """
    self._check(x.shape[1], context)
    shape = (self.count, x.shape[-1])
    fans = (self.count + (self.depth or 0)) * x.shape[-1]
    inner = _initialiser(self.start, fans)
    prompts = self.param('prompt_tokens', inner, shape)[None]
    here = self.depth is None or layer < self.depth
    if self.gated:
      gates = self._gates(layer, context, here)
      prompts = gates[..., None] * prompts
    prompts = jnp.broadcast_to(prompts, (len(x), *shape)).astype(x.dtype)
    if self.mode == 'add':
      patched = x + prompts
    else:
      patched = jnp.concatenate([prompts, x[:, self.count :]], 1)
    return jnp.where(here, patched, x)

  def noise(self, layer: int | jax.Array, keys: jax.Array) -> jax.Array:
    """Return standard normal draws f32 [B, n], one stream a layer."""
    draw = lambda key: jax.random.normal(key, (self.count,))  # noqa: E731
    return jax.vmap(draw)(fold(keys, layer))

  def _gates(self, layer, context, here):
    logits = context.prepared(SHARED)
    chosen = int(self.top * self.count)
    clean = noisy = logits.at(layer)
    if context.keys is not None:
      noisy = clean + logits.std * self.noise(layer, context.keys)
    gates = gating.mix(noisy, chosen)
    drawn = context.keys is not None and chosen < self.count
    if drawn:
      load = gating.chance(clean, noisy, logits.std, chosen)
    else:
      load = (gates > 0).astype(jnp.float32)
    for name, value in (
      ('prompt_gates', gates),
      ('prompt_load', load),
      ('prompt_drawn', jnp.float32(drawn)),
    ):
      self.sow('aux', name, jnp.where(here, value, 0.0))
    return gates

  def _check(self, found, context):
    tokens = math.prod(context.grid)
    if self.mode == 'add' and found != self.count:
      raise ValueError(
        f'prompts are added to one token each: expected `denoiser.hooks.count` '
        f'{found}, the number of tokens, found {self.count}'
      )
    if self.mode == 'prepend' and found != tokens + self.count:
      raise ValueError(
        f'expected `denoiser.hooks.prefix` {self.count}, the number of prompts '
        f'(`denoiser.hooks.count`), found {found - tokens}'
      )


def _initialiser(init: Init, fans: int) -> nn.initializers.Initializer:
  """Return zeros, or U(+-sqrt(6 / fans)) (Xavier's, fans: in plus out)."""
  if init == 'zero':
    return nn.initializers.zeros
  limit = math.sqrt(6 / fans)

  def draw(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -limit, limit)

  return draw
