"""Pretrain UMT ViT-B, stage 1, on K710 with a frozen CLIP teacher.

    python -m vfm_jax.main --config=configs/umt_b.py \
      --config.data.train.source.root=DIR \
      --config.data.train.source.csv=DIR/train.csv \
      --config.objective.teacher.path=FILE

FILE is CLIP ViT-B/16, as released or as `transformers` saves it. Variants: none
for a TPU pod, `:gpu8` and `:gpu1` for 8 GPUs or one of 80 GB. Recipe: UMT
(arXiv:2303.16058), 8 frames, 201-epoch schedule; fine-tuned it gives 87.4 %
top-1 on Kinetics-400 there. As in the released code the teacher gets the
student's normalisation. Ours: not run at full size.
"""

from vfm_jax import optim, schedules
from vfm_jax.config import bind, ref, variant
from vfm_jax.data import augment, clips
from vfm_jax.data.folder import FolderCSV
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.experiment import Checkpoints, Data, Experiment
from vfm_jax.models.clip import ClipViT
from vfm_jax.models.encoders import VideoViT
from vfm_jax.objectives.distill import Distill
from vfm_jax.objectives.pixels import IMAGENET_MEAN, IMAGENET_STD
from vfm_jax.objectives.teachers import ClipTeacher
from vfm_jax.ops.guided import AttentionGuided


def get_config(arg=None):
  """Return the recipe for a pod, `gpu8` or `gpu1`."""
  accum = variant(arg, {'': 1, 'gpu8': 2, 'gpu1': 16})
  # The length of the published run, whatever the list that is given.
  batch, epochs, videos = 2048, 201, 658_000
  compute = dict(dtype='bfloat16', scan=True)
  video = dict(tubelet=1, frames=8, drop_path=0.1)
  return ref(
    Experiment,
    objective=ref(
      Distill,
      encoder=ref(VideoViT, size='B', **video, **compute),
      teacher=ref(
        ClipTeacher,
        model=ref(ClipViT, size='B/16', **compute),
        path='weights/clip_vit_b_16.pt',
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
      ),
      mask=ref(AttentionGuided, ratio=0.8),
    ),
    data=ref(
      Data,
      train=ref(
        Pipeline,
        source=ref(
          FolderCSV,
          root='data/kinetics710',
          csv='data/kinetics710/train.csv',
          layout='list',
        ),
        clip=bind(clips.umt_train, frames=8),
        transform=ref(
          augment.Compose,
          transforms=(
            bind(augment.multi_scale_crop, size=224),
            bind(augment.horizontal_flip),
          ),
        ),
      ),
      workers=16,
    ),
    optim=ref(
      optim.Optimizer,
      lr=bind(
        schedules.warmup_cosine,
        peak=1.5e-4 * batch / 256,
        final=1e-5 * batch / 256,
        warmup_fraction=40 / epochs,
        ramp=schedules.closed_ramp,
      ),
      weight_decay=0.05,
    ),
    batch_size=batch,
    steps=epochs * videos // batch,
    accum=accum,
    checkpoint=ref(
      Checkpoints, every_steps=2000, every_minutes=30.0, keep_every_steps=20000
    ),
    log_every=50,
    watchdog_s=1800.0,
  )
