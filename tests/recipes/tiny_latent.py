"""Train a two-block DiT on latents that the tests write."""

from vfm_jax import optim, samplers, schedules
from vfm_jax.config import bind, ref
from vfm_jax.data import augment, clips
from vfm_jax.data.latent_pipeline import LatentPipeline
from vfm_jax.data.latents import Latents
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.data.synthetic import MovingShapes
from vfm_jax.experiment import Data, Experiment
from vfm_jax.latents import LatentDecoder
from vfm_jax.models.dit import DiT
from vfm_jax.objectives.denoise import Denoise
from vfm_jax.ops.diffusion import Gaussian
from vfm_jax.sampling import Sampling


def get_config(arg=None):
  """Return the recipe; the argument is the folder of the latents."""
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
        patch=2,
        input_size=4,
        num_classes=4,
      ),
      process=ref(Gaussian),
      data='latent',
      label='shape',
      sampling=ref(Sampling, sampler=bind(samplers.ddim, steps='2'), scale=1.5),
      decoder=ref(LatentDecoder),
    ),
    data=ref(
      Data, train=ref(LatentPipeline, source=ref(Latents, root=arg or ''))
    ),
    latents=dict(
      train=ref(
        Pipeline,
        source=ref(MovingShapes, count=16, frames=1, size=8),
        clip=bind(clips.uniform, frames=1),
        transform=augment.identity,
        path='latents.train',
      )
    ),
    optim=ref(optim.Optimizer, lr=bind(schedules.constant, value=1e-3)),
    batch_size=8,
    steps=2,
    log_every=1,
  )
