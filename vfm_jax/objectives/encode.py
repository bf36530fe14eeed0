"""Hold a released encoder: it embeds, and is not trained."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vfm_jax.objectives import base
from vfm_jax.objectives.pixels import (
  IMAGENET_MEAN,
  IMAGENET_STD,
  Channels,
  normalise,
  pixels,
)


@dataclasses.dataclass(frozen=True)
class Encoder:
  """Embed clips with an encoder whose weights come from a file.

  The verb `convert` reads them into a checkpoint; `embed` and `eval` use it.

  Attributes:
    encoder: (video [B, T, H, W, 3]) -> tokens [B, n, D], whose mean is the
      embedding, or the embedding [B, D] itself.
    token_view: module over the same parameters that gives tokens, for an
      encoder that gives embeddings, or other tokens than these. None for
      `encoder` itself.
    mean: per-channel mean of the encoder's input, of pixels in [0, 1].
    std: per-channel standard deviation.
    read: how a released file becomes parameters, of `vfm_jax.readers`.
    ignore: reasons by regular expression, for tensors of the file to leave
      out beside those that `read` does.
    num_params: number of parameters of the published model; None where it is
      not known.
  """

  encoder: nn.Module
  token_view: nn.Module | None = None
  mean: Channels = IMAGENET_MEAN
  std: Channels = IMAGENET_STD
  read: Callable[..., Any] | None = None
  ignore: Mapping[str, str] = dataclasses.field(default_factory=dict)
  num_params: int | None = None

  def init(
    self, rng: jax.Array, batch: base.Batch
  ) -> tuple[base.PyTree, base.PyTree]:
    """Return random parameters {'encoder'} and no other state."""
    params: Any = self.encoder.init(rng, self._video(batch)[:1])
    return {'encoder': params['params']}, {}

  def loss(
    self,
    params: base.PyTree,
    extra: base.PyTree,
    batch: base.Batch,
    rng: jax.Array,
    *,
    train: bool,
  ) -> base.LossOut:
    """Refuse: nothing says what to learn.

    Raises:
      ValueError: always.
    """
    del params, extra, batch, rng, train
    raise ValueError(
      'config.objective: an Encoder holds released weights and is not trained; '
      'it is for the verbs convert, embed and eval. To train such a network '
      'give it to an objective that learns, and the weights as '
      'config.warm_start'
    )

  after_update = base.keep_extra

  def embed(self, params: base.PyTree, batch: base.Batch) -> jax.Array:
    """Return embeddings, f32 [B, D]: the mean of tokens, if there are any."""
    x = _apply(self.encoder, params, self._video(batch))
    return x if x.ndim == 2 else x.mean(1)

  def tokens(self, params: base.PyTree, batch: base.Batch) -> jax.Array:
    """Return tokens, f32 [B, n, D].

    Raises:
      ValueError: the encoder gives embeddings only.
    """
    view = self.token_view or self.encoder
    x = _apply(view, params, self._video(batch))
    if x.ndim != 3:
      raise ValueError(
        'expected an encoder that gives tokens [B, n, D], found '
        f'{tuple(x.shape)}; set `objective.token_view`'
      )
    return x

  def converted(
    self, state: Mapping[str, Any], template: base.PyTree
  ) -> base.PyTree:
    """Return the parameters of a released file.

    Args:
      state: its tensors by name.
      template: parameters, or their shapes.

    Raises:
      ValueError: `read` says no layout.
      ConversionError: a tensor is missing, left over or of another shape.
    """
    if self.read is None:
      raise ValueError(
        'expected `objective.read`, a reader of vfm_jax.readers that knows the '
        'layout of the file, found None'
      )
    return {
      'encoder': self.read(
        state, template['encoder'], self.encoder, ignore=self.ignore
      )
    }

  def _video(self, batch):
    return normalise(pixels(batch), self.mean, self.std)


def _apply(module, params, video) -> jax.Array:
  out = module.apply({'params': params['encoder']}, video)
  return out.astype(jnp.float32)
