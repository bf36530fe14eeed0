"""Compare videos and texts with the video-text models of VideoPrism (LvT)."""

import string
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vfm_jax.models.videoprism import VideoPrism
from vfm_jax.nn import layers, prism


class TextTower(nn.Module):
  """Turn a text into a vector; its last token, a learned one, becomes it.

  Attributes:
    vocabulary: number of tokens that the tokeniser knows.
    width: features of a token.
    depth: number of blocks.
    heads: number of attention heads.
    causal: tokens attend to themselves and what is before them.
    cap: bound on the logits of attention; 0 for none.
    norm_policy: see `nn.prism.PrismBlock`.
    scan: compile one block and loop over it.
    dtype: compute type; parameters are float32.
  """

  vocabulary: int
  width: int
  heads: int
  depth: int = 12
  causal: bool = True
  cap: float = 50.0
  norm_policy: prism.NormPolicy = 'pre'
  scan: bool = False
  dtype: layers.Dtype = 'float32'

  @nn.compact
  def __call__(self, ids: jax.Array, valid: jax.Array) -> jax.Array:
    """Return [B, D].

    Args:
      ids: int [B, L] tokens of the SentencePiece model that was trained with
        the tower, of `canonical` texts.
      valid: bool [B, L], False for padding.
    """
    b, length = ids.shape
    init = nn.initializers.normal(self.width**-0.5)
    table = self.param('tokens', init, (self.vocabulary, self.width))
    last = self.param('class_token', init, (1, self.width))
    scale = self.width**0.5
    x = scale * table[ids] + text_positions(length, self.width)
    last = jnp.broadcast_to(scale * last, (b, 1, self.width))
    x = jnp.concatenate([x, last], axis=1).astype(self.dtype)
    valid = jnp.concatenate([valid, jnp.ones((b, 1), bool)], axis=1)
    block = prism.PrismBlock(
      self.heads,
      4 * self.width,
      self.cap,
      self.norm_policy,
      'relu',
      self.dtype,
      parent=None,
    )
    stack = prism.PrismStack(
      self.depth, block, causal=self.causal, scan=self.scan, name='body'
    )
    nn.share_scope(self, stack)
    return stack(x, valid)[:, -1]


class VideoPrismClip(nn.Module):
  """Give videos and texts vectors of one space.

  Attributes:
    encoder: encoder of the video.
    text: the text tower; None embeds videos only.
    auxiliary_depth: blocks over all tokens of a clip, after the encoder.
    output: what a video gives: the 'vector' that is compared with texts, or
      the 'tokens' that it is pooled from.
  """

  encoder: VideoPrism
  text: TextTower | None = None
  auxiliary_depth: int = 2
  output: Literal['vector', 'tokens'] = 'vector'

  def setup(self):
    """Make the submodules (called by Flax)."""
    dims = self.encoder.dims
    if self.auxiliary_depth:
      self.auxiliary = self.encoder.stack(
        self.auxiliary_depth, final_norm=False
      )
    self.pooler = prism.AttentionPooler(
      dims.heads, 4 * dims.width, self.encoder.dtype
    )

  def __call__(self, video: jax.Array) -> jax.Array:
    """Return unit vectors f32 [B, D], or tokens [B, T * N, D].

    Args:
      video: float [B, T, H, W, 3] in [0, 1].
    """
    if self.is_initializing() and self.text is not None:
      # The parameters are those of both towers.
      self.text(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool))
    if self.output == 'tokens':
      return self._tokens(video)
    return layers.unit(self.embed(video))

  def embed(self, video: jax.Array) -> jax.Array:
    """Return the vectors f32 [B, D] of videos, of any length."""
    return self.pooler(self._tokens(video))

  def embed_frames(self, video: jax.Array) -> jax.Array:
    """Return the vectors f32 [B, T, D] of frames: each pooled by itself."""
    b, t = video.shape[:2]
    x = self._tokens(video)
    return self.pooler(x.reshape(b * t, -1, x.shape[-1])).reshape(b, t, -1)

  def embed_text(self, ids: jax.Array, valid: jax.Array) -> jax.Array:
    """Return the vectors f32 [B, D] of texts, of any length.

    Args:
      ids: see `TextTower`.
      valid: see `TextTower`.

    Raises:
      ValueError: there is no text tower.
    """
    if self.text is None:
      raise ValueError('texts need `encoder.text`, a TextTower; found None')
    return self.text(ids, valid).astype(jnp.float32)

  def _tokens(self, video):
    x = self.encoder(video)
    return self.auxiliary(x) if self.auxiliary_depth else x


def text_positions(length: int, dim: int) -> np.ndarray:
  """Return the positions of the text tower, f32 [length, dim].

  [sin(n w) | cos(n w)], w from 1 to 1e-4 in dim // 2 equal ratios, both ends
  included; the last column of an odd `dim` is zero.
  """
  half = dim // 2
  rate = np.exp(-np.arange(half) * (np.log(1e4) / max(half - 1, 1)))
  angle = np.arange(length)[:, None] * rate
  table = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
  return np.pad(table, [(0, 0), (0, dim % 2)]).astype(np.float32)


def canonical(text: str) -> str:
  """Return the form of a text that the tokeniser was trained with.

  ASCII punctuation becomes space, letters lower case, runs of space one; a
  full stop ends it.
  """
  spaces = str.maketrans(string.punctuation, ' ' * len(string.punctuation))
  return ' '.join(text.translate(spaces).lower().split()) + '.'
