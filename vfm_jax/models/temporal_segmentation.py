"""Label every frame of a long video from the features of its clips.

The network of ASFormer (Yi et al., arXiv:2110.08568), as the evaluation
framework of TWLV-I (arXiv:2408.11318, repository) trains it: an encoder gives
a first prediction, decoders refine it. Layer i of a stage has a convolution of
dilation 2^i and attention over windows of 2^i frames, or over the whole video.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from vfm_jax.nn import layers

Attend = Literal['sliding', 'full']
Window = Literal['query', 'block']
Padding = Literal['excluded', 'included']

# What the released mask adds before its logarithm.
_SOFT = 1e-6


class Segmenter(nn.Module):
  """Turn features [B, L, D] into the logits of every stage.

  Attributes:
    num_classes: classes C.
    width: features of a frame inside the network.
    depth: layers of a stage; layer i reaches 2^i frames.
    decoders: stages that refine the first one.
    reduction: queries, keys and values have `width / reduction` features.
    attend: 'sliding' within windows, 'full' over the video.
    window: what a query of sliding attention sees. 'query': the 2^i frames
      around it, as the paper has it. 'block': what every published number of
      ASFormer was made with. Its code fills the window mask for all queries
      of a block of 2^i frames at once, so that each sees the whole extended
      block but its last frame; and frames outside keep a weight of 1e-6 in
      the denominator of the softmax.
    padding: 'excluded': frames that are not valid change nothing. 'included':
      as released for batches of several videos, where they enter the
      statistics of the norms, the convolutions and, with the weight of 1e-6,
      the softmax. Both are the same where every frame is valid.
    channel_dropout: rate at which whole input features are dropped.
    dropout: rate of each layer's output.
  """

  num_classes: int
  width: int = 256
  depth: int = 8
  decoders: int = 3
  reduction: int = 2
  attend: Attend = 'sliding'
  window: Window = 'query'
  padding: Padding = 'excluded'
  channel_dropout: float = 0.3
  dropout: float = 0.5

  def setup(self):
    """Make the submodules (called by Flax)."""
    if self.width % self.reduction:
      raise ValueError(
        f'expected a head.width that head.reduction={self.reduction} divides, '
        f'found {self.width}'
      )
    stage: Any = dict(
      num_classes=self.num_classes,
      width=self.width,
      depth=self.depth,
      reduction=self.reduction,
      attend=self.attend,
      window=self.window,
      padding=self.padding,
      dropout=self.dropout,
    )
    self.drop = nn.Dropout(self.channel_dropout, broadcast_dims=(1,))
    self.encoder = Stage(**stage)
    # Each decoder trusts attention less: alpha = exp(-3 s).
    self.refine = [
      Stage(**stage, alpha=math.exp(-3.0 * s), name=f'decoder_{s}')
      for s in range(self.decoders)
    ]

  def __call__(
    self, x: jax.Array, valid: jax.Array, *, train: bool = False
  ) -> jax.Array:
    """Return the logits f32 [stages, B, L, C].

    Args:
      x: f32 [B, L, D], a row a frame.
      valid: bool [B, L], False for padding.
      train: drop out; needs the rng 'dropout'.
    """
    return jnp.stack([logits for logits, _ in self.stages(x, valid, train)])

  def stages(
    self, x: jax.Array, valid: jax.Array, train: bool = False
  ) -> list[tuple[jax.Array, jax.Array]]:
    """Return (logits [B, L, C], features [B, L, width]) of every stage."""
    x = self.drop(x, deterministic=not train)
    out = [self.encoder(x, None, valid, train)]
    for decoder in self.refine:
      logits, features = out[-1]
      probabilities = jax.nn.softmax(logits) * valid[..., None]
      cross = features * valid[..., None]
      out.append(decoder(probabilities, cross, valid, train))
    return out


class Stage(nn.Module):
  """Apply one stage: embed, layers of growing reach, classify."""

  num_classes: int
  width: int
  depth: int
  reduction: int
  attend: Attend
  window: Window
  padding: Padding
  dropout: float
  alpha: float = 1.0

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    cross: jax.Array | None,
    valid: jax.Array,
    train: bool,
  ) -> tuple[jax.Array, jax.Array]:
    """Return logits [B, L, C] and features [B, L, width].

    Args:
      x: [B, L, D] or probabilities [B, L, C].
      cross: features [B, L, width] of the stage before, that values are made
        of; None makes them of the queries' features.
      valid: bool [B, L].
      train: drop out.
    """
    x = _dense(self.width, x.shape[-1], 'embed')(x)
    if self.padding == 'excluded':
      x = x * valid[..., None]
    for i in range(self.depth):
      x = Layer(
        reach=2**i,
        reduction=self.reduction,
        attend=self.attend,
        window=self.window,
        padding=self.padding,
        dropout=self.dropout,
        alpha=self.alpha,
        name=f'layer_{i}',
      )(x, cross, valid, train)
    logits = _dense(self.num_classes, self.width, 'head')(x)
    return logits * valid[..., None], x


class Layer(nn.Module):
  """Add a dilated convolution with attention on top of it to x."""

  reach: int
  reduction: int
  attend: Attend
  window: Window
  padding: Padding
  dropout: float
  alpha: float

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    cross: jax.Array | None,
    valid: jax.Array,
    train: bool,
  ) -> jax.Array:
    """Return [B, L, width]; arguments as in `Stage`."""
    width = x.shape[-1]
    init = layers.uniform_fan_in(3 * width)
    conv = nn.Conv(
      width,
      (3,),
      kernel_dilation=self.reach,
      kernel_init=init,
      bias_init=init,
      name='conv',
    )
    h = jax.nn.relu(conv(x))
    counted = valid if self.padding == 'excluded' else jnp.ones_like(valid)
    query = _standardise(h, counted)
    attention = FrameAttention(
      reach=self.reach,
      width=width // self.reduction,
      attend=self.attend,
      window=self.window,
      padding=self.padding,
      name='attention',
    )
    h = h + self.alpha * attention(query, cross, valid)
    h = _dense(width, width, 'proj')(h)
    h = nn.Dropout(self.dropout)(h, deterministic=not train)
    return (x + h) * valid[..., None]


class FrameAttention(nn.Module):
  """Attend over frames with one head.

  Attributes:
    reach: length of a block and of a window, frames.
    width: features of queries, keys and values.
    attend: see `Segmenter`.
    window: see `Segmenter`.
    padding: see `Segmenter`.
  """

  reach: int
  width: int
  attend: Attend = 'sliding'
  window: Window = 'query'
  padding: Padding = 'excluded'

  @nn.compact
  def __call__(
    self, x: jax.Array, cross: jax.Array | None, valid: jax.Array
  ) -> jax.Array:
    """Return [B, L, D].

    Args:
      x: [B, L, D] that queries and keys are made of.
      cross: [B, L, D] that values are made of; None for x.
      valid: bool [B, L].
    """
    dim = x.shape[-1]
    q = _dense(self.width, dim, 'query')(x)
    k = _dense(self.width, dim, 'key')(x)
    v = _dense(self.width, dim, 'value')(x if cross is None else cross)
    if self.padding == 'excluded':
      # The released code pads one video after it has made the keys.
      k = k * valid[..., None]
    if self.attend == 'full':
      soft = self.padding == 'included'
      core = jax.checkpoint(attend, static_argnums=4)
      h = core(q, k, v, valid[:, None, :], soft)
    else:
      h = sliding(q, k, v, valid, self.reach, self.window)
    h = _dense(dim, self.width, 'out')(jax.nn.relu(h))
    return h * valid[..., None]


def sliding(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  valid: jax.Array,
  reach: int,
  window: Window,
) -> jax.Array:
  """Attend within windows; see `Segmenter.window`.

  Block b holds the queries [b l, (b + 1) l), l = reach, and its extended
  window the keys [b l - l // 2, (b + 1) l + l // 2).

  Args:
    q: [B, L, c].
    k: [B, L, c].
    v: [B, L, d].
    valid: bool [B, L].
    reach: l, 1 or even.
    window: see `Segmenter`.

  Returns:
    [B, L, d].
  """
  b, length, c = q.shape
  half, blocks = reach // 2, -(-length // reach)
  tail = blocks * reach - length
  q = jnp.pad(q, ((0, 0), (0, tail), (0, 0))).reshape(b, blocks, reach, c)

  def extend(x):
    x = jnp.pad(x, ((0, 0), (half, half + tail), (0, 0)))
    if not half:
      return x.reshape(b, blocks, reach, -1)
    # Four half blocks make an extended window of an even length.
    x = x.reshape(b, 2 * blocks + 2, half, -1)
    parts = [x[:, j : j + 2 * blocks : 2] for j in range(4)]
    return jnp.concatenate(parts, axis=2)

  row = jnp.arange(reach)[:, None]
  column = jnp.arange(reach + 2 * half)
  seen = (column >= row) & (column < row + reach)
  if window == 'block':
    seen = seen.any(0, keepdims=True)
  inside = extend(valid[..., None])[..., 0][:, :, None, :]
  h = attend(q, extend(k), extend(v), seen & inside, window == 'block')
  return h.reshape(b, blocks * reach, -1)[:, :length]


def attend(
  q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, soft: bool
) -> jax.Array:
  """Return softmax(q k^T / sqrt(c)) v [..., n, d]; nothing seen gives 0.

  Args:
    q: [..., n, c].
    k: [..., m, c].
    v: [..., m, d].
    seen: bool, broadcastable to [..., n, m].
    soft: keys that are not seen keep the weight 1e-6 in the denominator.
  """
  logits = jnp.einsum('...nc,...mc->...nm', q, k) * q.shape[-1] ** -0.5
  if soft:
    logits = logits + jnp.log(seen + _SOFT)
  else:
    logits = jnp.where(seen, logits, jnp.finfo(logits.dtype).min)
  weights = jax.nn.softmax(logits) * seen
  return jnp.einsum('...nm,...mc->...nc', weights, v)


def losses(
  logits: jax.Array,
  y: jax.Array,
  valid: jax.Array,
  *,
  padding: Padding = 'excluded',
  cap: float = 16.0,
) -> tuple[jax.Array, jax.Array]:
  """Return the cross entropy and the smoothing loss of each stage, f32 [S].

  Smoothing is the mean over frames and classes of
  min((log p_t - sg[log p_{t-1}])^2, cap) (MS-TCN, arXiv:1903.01945, eq. 4 and
  5): the gradient reaches the later frame alone.

  Args:
    logits: f32 [S, B, L, C].
    y: int [B, L] classes; any number where not valid.
    valid: bool [B, L].
    padding: 'included' divides the smoothing loss by all L - 1 steps, as the
      released code does, 'excluded' by those that end at a valid frame.
    cap: tau^2.
  """
  logp = jax.nn.log_softmax(logits)
  y = jnp.where(valid, y, 0)
  chosen = jnp.take_along_axis(logp, y[None, ..., None], axis=-1)[..., 0]
  frames = jnp.maximum(valid.sum(), 1)
  entropy = -jnp.where(valid, chosen, 0.0).sum((1, 2)) / frames
  step = logp[:, :, 1:] - jax.lax.stop_gradient(logp[:, :, :-1])
  step = jnp.minimum(jnp.square(step), cap) * valid[:, 1:, None]
  counted = valid[:, 1:]
  steps = counted.size if padding == 'included' else counted.sum()
  smoothing = step.sum((1, 2, 3)) / jnp.maximum(steps * logp.shape[-1], 1)
  return entropy, smoothing


def _standardise(x: jax.Array, counted: jax.Array) -> jax.Array:
  """Normalise each feature of x [B, L, D] over the counted frames [B, L]."""
  weight = counted[..., None].astype(x.dtype)
  total = jnp.maximum(weight.sum(1, keepdims=True), 1.0)
  x = x - (x * weight).sum(1, keepdims=True) / total
  variance = (jnp.square(x) * weight).sum(1, keepdims=True) / total
  return x * jax.lax.rsqrt(variance + 1e-5)


def _dense(features: int, fan_in: int, name: str) -> nn.Module:
  init = layers.uniform_fan_in(fan_in)
  return layers.Dense(features, kernel_init=init, bias_init=init, name=name)
