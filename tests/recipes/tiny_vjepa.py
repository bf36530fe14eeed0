"""A latent prediction that trains in seconds, for the tests."""

from vfm_jax import optim, schedules
from vfm_jax.config import bind, ref
from vfm_jax.data import augment, clips
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.data.synthetic import MovingShapes
from vfm_jax.experiment import Checkpoints, Data, Experiment
from vfm_jax.models.encoders import VideoViT
from vfm_jax.models.vjepa import LatentPredictor
from vfm_jax.objectives.latent import LatentPrediction


def get_config(arg=None):
  del arg
  return ref(
    Experiment,
    objective=ref(
      LatentPrediction,
      encoder=ref(
        VideoViT,
        width=32,
        depth=2,
        heads=2,
        patch=8,
        frames=4,
        image_size=32,
        positions='rope_3d',
        qkv_bias='full',
        init_scheme='normal',
        drop_path=0.1,
      ),
      predictor=ref(
        LatentPredictor, width=16, depth=1, heads=2, positions='rope_3d'
      ),
      momentum=bind(schedules.linear, total_steps=30, peak=0.9, final=1.0),
    ),
    data=ref(
      Data,
      train=ref(
        Pipeline,
        source=ref(MovingShapes, count=64, frames=8, size=40),
        clip=bind(clips.vjepa_train, frames=4, stride=1),
        transform=bind(augment.multi_scale_crop, size=32),
      ),
    ),
    optim=ref(
      optim.Optimizer,
      lr=bind(schedules.warmup_cosine, peak=1e-3, warmup_steps=2),
      clip_norm=1.0,
      clip_apart=('^encoder/', '^predictor/'),
      clip_from=2,
    ),
    batch_size=8,
    steps=30,
    log_every=5,
    checkpoint=ref(Checkpoints, every_steps=15),
  )
