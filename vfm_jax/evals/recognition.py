"""Set up the online probes as the TWLV-I report does, data set by data set.

Table 4 and the text on attentive probing (arXiv:2408.11318): clips of 16
frames, random resized crops of 30 to 100 % of the area, views of evenly spaced
crops times clips at test. Optimizers, and the momentum and bias of the linear
probe, are ours: the report names none.
"""

import dataclasses
import functools
import types
from collections.abc import Mapping

from vfm_jax.data import augment, clips, sources
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.evals import attentive, online
from vfm_jax.models.attentive import AttentivePooler

FRAMES = 16
SCALE = (0.3, 1.0)
LINEAR_RATIO, ATTENTIVE_RATIO = (0.75, 1.33), (0.5, 2.0)


@dataclasses.dataclass(frozen=True)
class Setting:
  """Hold a column of Table 4.

  Attributes:
    stride: frames between two of a clip.
    crops: places along the long side at test.
    clips: places in time at test.
    flip: mirror half of the training clips.
    lr: of the linear probe.
    epochs: of the linear probe, 10 of them warm-up.
    attentive_epochs: of the attentive probe.
  """

  stride: int
  crops: int
  clips: int
  flip: bool
  lr: float
  epochs: int
  attentive_epochs: int = 20


SETTINGS: Mapping[str, Setting] = types.MappingProxyType(
  {
    'K400': Setting(4, 3, 4, True, 0.1, 150),
    'MiT': Setting(1, 3, 4, False, 0.1, 50),
    'SSv2': Setting(1, 3, 1, False, 0.075, 50),
    'DV48': Setting(4, 3, 4, False, 0.02, 300, 50),
    'EK': Setting(1, 3, 4, True, 0.1, 150, 50),
  }
)


def linear(
  name: str,
  train: sources.Source,
  val: sources.Source,
  label: str,
  *,
  size: int = 224,
  eval_batch: int = 32,
) -> online.OnlineLinearProbe:
  """Return the linear probe of a data set.

  Args:
    name: of the data set, one of `SETTINGS`.
    train: its training videos.
    val: its validation videos.
    label: name of the class in their labels.
    size: height and width of the encoder's input, pixels.
    eval_batch: clips encoded at a time in evaluations.

  Raises:
    ValueError: there is no such data set.
  """
  s = _setting(name)
  return online.OnlineLinearProbe(
    train=_train(s, train, size, LINEAR_RATIO),
    val=_test(s, val, size),
    labels=(label,),
    training=dataclasses.replace(online.TRAINING, lrs=(s.lr,), epochs=s.epochs),
    eval_batch=eval_batch,
    benchmark=name,
  )


def attend(
  name: str,
  train: sources.Source,
  val: sources.Source,
  label: str,
  *,
  heads: int,
  lrs: tuple[float, ...] = attentive.TRAINING.lrs,
  wds: tuple[float, ...] = attentive.TRAINING.wds,
  size: int = 224,
  eval_batch: int = 32,
) -> attentive.AttentiveProbe:
  """Return the attentive probe of a data set; arguments as `linear`.

  Args:
    name: of the data set.
    train: its training videos.
    val: its validation videos.
    label: name of the class in their labels.
    heads: attention heads, as many as the encoder has.
    lrs: learning rates of a grid; the report has one.
    wds: weight decays of a grid; the report has one.
    size: height and width of the encoder's input, pixels.
    eval_batch: clips encoded at a time in evaluations.

  Raises:
    ValueError: there is no such data set.
  """
  s = _setting(name)
  return attentive.AttentiveProbe(
    train=_train(s, train, size, ATTENTIVE_RATIO),
    val=_test(s, val, size),
    labels=(label,),
    training=dataclasses.replace(
      attentive.TRAINING, lrs=lrs, wds=wds, epochs=s.attentive_epochs
    ),
    pooler=AttentivePooler(heads=heads),
    eval_batch=eval_batch,
    benchmark=name,
  )


def _setting(name: str) -> Setting:
  if name not in SETTINGS:
    raise ValueError(
      f'no setting for {name!r} in the report; expected one of {list(SETTINGS)}'
    )
  return SETTINGS[name]


def _train(s: Setting, source: sources.Source, size: int, ratio) -> Pipeline:
  crop = functools.partial(
    augment.random_resized_crop, size=size, scale=SCALE, ratio=ratio
  )
  steps = (crop, augment.horizontal_flip) if s.flip else (crop,)
  return Pipeline(
    source=source,
    clip=functools.partial(
      clips.videomae_pretrain, frames=FRAMES, stride=s.stride
    ),
    transform=augment.Compose(steps),
    path='probe.train',
  )


def _test(s: Setting, source: sources.Source, size: int) -> Pipeline:
  return Pipeline(
    source=source,
    clip=functools.partial(
      clips.videomae_dense_test, frames=FRAMES, stride=s.stride, clips=s.clips
    ),
    transform=functools.partial(augment.three_crops, size=size, crops=s.crops),
    views=s.crops * s.clips,
    path='probe.val',
  )
