"""Read released files into encoders alone: what else they hold is left out.

A reader is a function (state, template, encoder, *, ignore) -> parameters:
tensors by name, shapes of the parameters of `encoder`, the module itself, and
reasons by regular expression for further tensors to leave out. It is strict
both ways: `ConversionError` names each tensor that is missing, of no use or of
another shape. `objectives.encode.Encoder` holds one.
"""

from collections.abc import Mapping

from flax import linen as nn

from vfm_jax import convert, convert_umt, convert_videoprism, convert_vjepa
from vfm_jax.convert import PyTree, State
from vfm_jax.models.encoders import VideoViT

Reasons = Mapping[str, str]

_DECODER = {
  r'decoder\..*|encoder_to_decoder\..*|mask_token': (
    'the decoder of pretraining embeds nothing'
  )
}
_PREDICTOR = {
  r'(vjepa2\.)?predictor\..*': 'the predictor embeds nothing',
  r'(pooler|classifier)\..*': 'the encoder has no probe',
}
_HEAD = {r'(head|classifier)\..*': 'the encoder has no class head'}


def videomae(
  state: State,
  template: PyTree,
  encoder: nn.Module,
  *,
  ignore: Reasons | None = None,
) -> PyTree:
  """Read VideoMAE or VideoMAE V2, pretrained or fine-tuned."""
  ignored = {**_DECODER, **(ignore or {})}
  if not getattr(encoder, 'num_classes', 0):
    ignored |= _HEAD
  whole = {'encoder': template}
  return convert.from_videomae(state, whole, ignore=ignored)['encoder']


def vjepa(
  state: State,
  template: PyTree,
  encoder: VideoViT,
  *,
  ignore: Reasons | None = None,
) -> PyTree:
  """Read an encoder of V-JEPA or V-JEPA 2; of a training file its average."""
  ignored = {**_PREDICTOR, **(ignore or {})}
  whole = {'encoder': template}
  params = convert_vjepa.from_vjepa(
    state, whole, encoder=encoder, ignore=ignored
  )
  return params['encoder']


def umt(
  state: State,
  template: PyTree,
  encoder: VideoViT,
  *,
  ignore: Reasons | None = None,
) -> PyTree:
  """Read a student of UMT, pretrained or fine-tuned."""
  ignored = dict(ignore or {})
  if not encoder.num_classes:
    ignored |= _HEAD
  whole = {'encoder': template}
  params = convert_umt.from_umt(state, whole, encoder=encoder, ignore=ignored)
  return params['encoder']


def clip(
  state: State,
  template: PyTree,
  encoder: nn.Module,
  *,
  ignore: Reasons | None = None,
) -> PyTree:
  """Read the image tower of CLIP."""
  del encoder
  return convert_umt.from_clip(state, template, ignore=ignore)


def videoprism(
  state: State,
  template: PyTree,
  encoder: nn.Module,
  *,
  ignore: Reasons | None = None,
) -> PyTree:
  """Read VideoPrism: an encoder, a classifier or a video-text model."""
  ignored = dict(ignore or {})
  if getattr(encoder, 'text', None) is None:
    ignored |= convert_videoprism.TEXT
  return convert_videoprism.from_videoprism(state, template, ignore=ignored)
