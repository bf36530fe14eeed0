"""Train a two-block DiT on moving shapes, for the tests."""

from vfm_jax import optim, samplers, schedules
from vfm_jax.config import bind, ref
from vfm_jax.data import augment, clips
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.data.synthetic import MovingShapes
from vfm_jax.experiment import Checkpoints, Data, Experiment
from vfm_jax.models.dit import DiT
from vfm_jax.objectives.denoise import Denoise
from vfm_jax.ops.diffusion import Gaussian
from vfm_jax.sampling import Sampling


def get_config(arg=None):
  """Return the recipe."""
  del arg
  return ref(
    Experiment,
    objective=ref(
      Denoise,
      denoiser=ref(
        DiT,
        size='S',
        width=32,
        depth=2,
        heads=2,
        patch=8,
        tubelet=2,
        frames=4,
        input_size=16,
        channels=3,
        num_classes=4,
      ),
      process=ref(Gaussian),
      data='video',
      label='shape',
      sampling=ref(Sampling, sampler=bind(samplers.ddim, steps='4'), scale=1.5),
    ),
    data=ref(
      Data,
      train=ref(
        Pipeline,
        source=ref(MovingShapes, count=64, frames=4, size=16),
        clip=bind(clips.uniform, frames=4),
        transform=augment.identity,
      ),
    ),
    optim=ref(optim.Optimizer, lr=bind(schedules.constant, value=1e-3)),
    batch_size=8,
    steps=30,
    ema=(0.9,),
    eval_ema=0.9,
    log_every=5,
    checkpoint=ref(Checkpoints, every_steps=15),
  )
