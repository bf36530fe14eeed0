"""A masked video autoencoder that trains in seconds, for the tests."""

from vfm_jax import optim, schedules
from vfm_jax.config import bind, ref
from vfm_jax.data import augment, clips
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.data.synthetic import MovingShapes
from vfm_jax.experiment import Checkpoints, Data, Experiment
from vfm_jax.models.encoders import VideoViT
from vfm_jax.models.predictors import PixelDecoder
from vfm_jax.objectives.masked import Masked
from vfm_jax.ops import masking


def get_config(arg=None):
  del arg
  return ref(
    Experiment,
    objective=ref(
      Masked,
      encoder=ref(
        VideoViT,
        size='S',
        width=32,
        depth=2,
        heads=2,
        patch=8,
        frames=4,
        image_size=16,
        drop_path=0.1,
      ),
      decoder=ref(PixelDecoder, width=16, depth=1, heads=2),
      mask=bind(masking.tube, ratio=0.5),
    ),
    data=ref(
      Data,
      train=ref(
        Pipeline,
        source=ref(MovingShapes, count=64, frames=8, size=24),
        clip=bind(clips.videomae_pretrain, frames=4, stride=1),
        transform=bind(augment.multi_scale_crop, size=16),
      ),
    ),
    optim=ref(
      optim.Optimizer,
      lr=bind(schedules.warmup_cosine, peak=1e-3, warmup_steps=2),
    ),
    batch_size=8,
    steps=30,
    ema=(0.9,),
    log_every=5,
    checkpoint=ref(Checkpoints, every_steps=15),
  )
