"""A classifier that trains in seconds, for the tests."""

from vfm_jax import optim, schedules
from vfm_jax.config import bind, ref
from vfm_jax.data import augment, clips
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.data.synthetic import MovingShapes
from vfm_jax.experiment import Checkpoints, Data, Experiment
from vfm_jax.models.encoders import VideoViT
from vfm_jax.objectives.classify import Classify


def get_config(arg=None):
  del arg
  return ref(
    Experiment,
    objective=ref(
      Classify,
      encoder=ref(
        VideoViT,
        size='S',
        width=32,
        depth=2,
        heads=2,
        patch=8,
        frames=4,
        image_size=16,
        pooling='mean',
        norm='pooled',
        num_classes=4,
        init_scheme='finetune',
        drop_path=0.1,
      ),
      label='direction',
      head_drop=0.1,
    ),
    data=ref(
      Data,
      train=ref(
        Pipeline,
        source=ref(MovingShapes, count=64, frames=8, size=24, directions=4),
        clip=bind(clips.videomae_pretrain, frames=4, stride=1),
        transform=bind(augment.multi_scale_crop, size=16),
      ),
    ),
    optim=ref(
      optim.Optimizer,
      lr=bind(schedules.warmup_cosine, peak=1e-3, warmup_steps=2),
      layer_decay=0.75,
    ),
    batch_size=8,
    steps=30,
    log_every=5,
    checkpoint=ref(Checkpoints, every_steps=15),
  )
