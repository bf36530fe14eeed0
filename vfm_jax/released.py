"""Name the released encoders: architecture, layout of the file, input.

Each is described as a node of a config, so that any of it can be changed.
Numbers of parameters are the published ones, of the whole model without a
class head; those that no source gives are left open.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from vfm_jax import readers
from vfm_jax.config import ConfigDict, ref
from vfm_jax.models import clip
from vfm_jax.models.clip import ClipViT
from vfm_jax.models.encoders import VideoViT
from vfm_jax.models.videoprism import VideoPrism
from vfm_jax.models.videoprism_clip import TextTower, VideoPrismClip
from vfm_jax.objectives.encode import Encoder


@dataclasses.dataclass(frozen=True)
class Released:
  """Describe an encoder.

  Attributes:
    model: class of the encoder.
    read: reader of its files.
    own: arguments of `model`.
    view: arguments, beside `own`, of the module that gives tokens; None where
      the encoder does.
    num_params: number of parameters, None where it is not published.
    frames: of a clip.
    pixels: rows and columns of a frame.
    inputs: `mean` and `std` of the input; ImageNet's where empty.
  """

  model: Callable[..., Any]
  read: Callable[..., Any]
  own: Mapping[str, Any]
  view: Mapping[str, Any] | None = None
  num_params: int | None = None
  frames: int = 16
  pixels: int = 224
  inputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def objective(self) -> ConfigDict:
    """Return the node of an `Encoder`."""
    view = None if self.view is None else {**self.own, **self.view}
    return ref(
      Encoder,
      encoder=ref(self.model, **self.own),
      token_view=None if view is None else ref(self.model, **view),
      read=self.read,
      num_params=self.num_params,
      **self.inputs,
    )


def _deep(**own: Any) -> dict[str, Any]:
  # Many blocks alike compile as one.
  return {'scan': True, **own}


def _videomae(size: str, num_params: int) -> Released:
  return Released(
    VideoViT, readers.videomae, _deep(size=size), num_params=num_params
  )


def _finetuned(size: str, num_params: int) -> Released:
  own = _deep(size=size, pooling='mean', norm='pooled')
  view = dict(pooling='none', norm='none')
  return Released(VideoViT, readers.videomae, own, view, num_params)


def _vjepa(size: str, num_params: int) -> Released:
  own = _deep(size=size, qkv_bias='full', positions='sincos_3d')
  return Released(VideoViT, readers.vjepa, own, num_params=num_params)


def _vjepa2(size: str, num_params: int, **own: Any) -> Released:
  own |= _deep(size=size, qkv_bias='full', positions='rope_3d_tiled')
  own |= dict(image_size=256, frames=64)
  # 64 frames are those of the last phase of training.
  return Released(
    VideoViT,
    readers.vjepa,
    own,
    num_params=num_params,
    frames=64,
    pixels=256,
  )


def _umt(size: str, num_params: int) -> Released:
  own = _deep(size=size, tubelet=1, frames=8, resample='bicubic')
  return Released(VideoViT, readers.umt, own, None, num_params, frames=8)


_UNIT = dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
_CLIP = dict(mean=clip.MEAN, std=clip.STD)


def _videoprism(size: str, num_params: int, frames: int) -> Released:
  own = _deep(size=size)
  read = readers.videoprism
  return Released(VideoPrism, read, own, None, num_params, frames, 288, _UNIT)


def _lvt(
  size: str, num_params: int, frames: int, width: int, heads: int
) -> Released:
  deep = _deep(vocabulary=32_000, width=width, heads=heads)
  text = ref(TextTower, **deep)
  own = dict(encoder=ref(VideoPrism, **_deep(size=size)), text=text)
  view = dict(output='tokens')
  read = readers.videoprism
  return Released(
    VideoPrismClip, read, own, view, num_params, frames, 288, _UNIT
  )


def _clip(num_params: int | None, **own: Any) -> Released:
  own |= _deep(output='class')
  view = dict(output='patches')
  return Released(ClipViT, readers.clip, own, view, num_params, inputs=_CLIP)


ENCODERS: Mapping[str, Released] = {
  'videomae_s': _videomae('S', 21_879_936),
  'videomae_b': _videomae('B', 86_227_200),
  'videomae_l': _videomae('L', 303_860_736),
  'videomae_h': _videomae('H', 631_607_040),
  'videomaev2_g': _videomae('g', 1_011_610_752),
  # Distilled from g and fine-tuned: a norm of the mean, and no other.
  'videomaev2_s': _finetuned('S', 21_879_936),
  'videomaev2_b': _finetuned('B', 86_227_200),
  'vjepa_l': _vjepa('L', 303_885_312),
  'vjepa_h': _vjepa('H', 631_648_000),
  'vjepa2_l': _vjepa2('L', 303_885_312),
  'vjepa2_h': _vjepa2('H', 631_648_000),
  'vjepa2_g': _vjepa2('g', 1_012_173_952, heads=22, patch=16),
  'umt_b': _umt('B', 85_637_376),
  'umt_l': _umt('L', 303_074_304),
  'videoprism_b': _videoprism('B', 114_365_184, 16),
  'videoprism_l': _videoprism('L', 353_965_056, 8),
  'videoprism_lvt_b': _lvt('B', 247_623_424, 16, 768, 12),
  'videoprism_lvt_l': _lvt('L', 579_877_120, 8, 1024, 16),
  'clip_b': _clip(86_192_640, size='B/16'),
  'clip_l': _clip(None, size='L/14'),
  # Data filtering networks (arXiv:2309.17425).
  'dfn_b': _clip(86_192_640, size='B/16'),
  'dfn_h': _clip(None, size='L/14', width=1280, depth=32, features=1024),
}
