"""Pretrain an encoder of TWLV-I's size B, by a reconstruction: `twlv1_like`.

    python -m vfm_jax.main --config=configs/twlv_b.py \
      --config.data.train.pipelines[0].source.root=DIR [... .csv=FILE] \
      --config.data.train.pipelines[1].source.root=IMAGES \
      --config.objective.teacher.path=FILE

Variants: none for a TPU pod, `:gpu8` and `:gpu1` for 8 GPUs or one of 80 GB.

The TWLV-I report (arXiv:2408.11318) discloses: a plain ViT of 86 M parameters
(L: 307 M), trained from scratch; masked modelling, with targets that draw on
distillation and on masked modelling; videos (K710, HowTo360K, WebVid10M) with
about 15 M images; 16 frames at probing. Nothing below is from it.

Ours, each a knob: patches of 16, slices of two frames, sinusoid, no class token
(`objective.encoder`); tube masks of 80 %, on images of 50 % and other positions
(`masks`, `image_masks`, `encoder.image_positions`); the targets: UMT's, of a
frozen CLIP on what is seen (`teacher`, `taps`, `heads`, `distill_weight`), and
V-JEPA's, of an average of the encoder on what is hidden (`predictor`,
`momentum`, `exponent`, `latent_weight`), weighed alike; the mean of all tokens
as embedding; three steps of videos to one of images (`data.train.turns`), crops
and flips; optimiser and length, UMT's rates over 100,000 steps (`optim`,
`steps`). Ours: not run at full size; the report's numbers (kNN 57.5 % on
Kinetics-400) are of their model, not of this one.
"""

import pathlib

from vfm_jax.config import bind, load, ref
from vfm_jax.data import augment, clips
from vfm_jax.data.folder import FolderImages
from vfm_jax.data.mixed import Mixed
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.models import clip
from vfm_jax.models.encoders import VideoViT
from vfm_jax.models.vjepa import LatentPredictor
from vfm_jax.objectives.twlv import Twlv
from vfm_jax.ops import masking


def get_config(arg=None):
  """Return the recipe for a pod, `gpu8` or `gpu1`."""
  base = pathlib.Path(__file__).with_name('umt_b.py')
  config = load(f'{base}:{arg or ""}')
  compute = dict(dtype='bfloat16', scan=True)
  config.unlock()
  teacher = config.objective.teacher
  teacher.update(mean=clip.MEAN, std=clip.STD)
  config.objective = ref(
    Twlv,
    encoder=ref(
      VideoViT, size='B', image_positions='sincos_2d', drop_path=0.1, **compute
    ),
    predictor=ref(LatentPredictor, **compute),
    teacher=teacher,
    heads=config.objective.heads,
    masks=(bind(masking.tube, ratio=0.8),),
    image_masks=(bind(masking.tube, ratio=0.5),),
  )
  config.objective.heads.image_positions = 'sincos_2d'
  videos = config.data.train
  videos.source.update(root='data/videos', csv='data/videos/train.csv')
  videos.clip = bind(clips.videomae_pretrain, frames=16, stride=4)
  videos.path = 'data.train.pipelines.0'
  images = ref(
    Pipeline,
    source=ref(FolderImages, root='data/images', label=''),
    clip=bind(clips.uniform, frames=1),
    transform=bind(augment.random_resized_crop, size=224, scale=(0.5, 1.0)),
    path='data.train.pipelines.1',
  )
  config.data.train = ref(Mixed, pipelines=(videos, images), turns=(3, 1))
  config.optim.lr.warmup_fraction = 0.05
  config.steps = 100_000
  return config
