"""A distillation with latents that trains in seconds, for the tests."""

from vfm_jax import optim, schedules
from vfm_jax.config import bind, ref
from vfm_jax.data import augment, clips
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.data.synthetic import MovingShapes
from vfm_jax.experiment import Checkpoints, Data, Experiment
from vfm_jax.models.clip import ClipViT
from vfm_jax.models.encoders import VideoViT
from vfm_jax.models.vjepa import LatentPredictor
from vfm_jax.objectives.teachers import ClipTeacher
from vfm_jax.objectives.twlv import Twlv
from vfm_jax.ops.guided import AttentionGuided


def get_config(arg=None):
  del arg
  small = dict(width=32, depth=2, heads=2, patch=8, image_size=16)
  return ref(
    Experiment,
    objective=ref(
      Twlv,
      encoder=ref(VideoViT, size='S', frames=4, drop_path=0.1, **small),
      predictor=ref(LatentPredictor, width=16, depth=1, heads=2),
      teacher=ref(
        ClipTeacher,
        model=ref(ClipViT, features=16, **small),
        seed=0,
        taps=(-1,),
      ),
      masks=(ref(AttentionGuided, ratio=0.5),),
      taps=(-1,),
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
