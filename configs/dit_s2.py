"""Train DiT-S/2 on latents of ImageNet at 256 x 256.

    python -m vfm_jax.main latents --config=configs/dit_s2.py:gpu1 \
      --vae=VAE --shards=64 --workdir=RUN \
      --config.latents.train.source.root=IMAGES
    python -m vfm_jax.main --config=configs/dit_s2.py \
      --config.data.train.source.root=DIR \
      --config.objective.decoder.path=VAE

IMAGES has a folder of images for each class; DIR is RUN/latents/train, which
the first command wrote; VAE a folder of sd-vae-ft-ema as diffusers saves it, or
'' for no pictures. Images are cropped to the centre and resized bilinearly with
antialiasing, where DiT halves by boxes first and then resizes bicubically.

Variants: none for a TPU pod, `gpu8` and `gpu1` for 8 GPUs or one of 80 GB;
before it `7m` for 7 M steps in place of 400 K, and `min_snr` or `p2` to weigh
noise levels (arXiv:2303.09556, arXiv:2204.00227), as in `:7m-min_snr-gpu8`.
Recipe: DiT (arXiv:2212.09748); FID-50K at 400 K steps without guidance 68.4.
Tokens are bfloat16 here. `sample` draws with 250 DDPM steps and a guidance of
4; FID: `--config.objective.sampling.scale=1.5`. Ours: not run at full size.
"""

import itertools

from vfm_jax import optim, samplers, schedules
from vfm_jax.config import bind, ref, variant
from vfm_jax.data import augment, clips
from vfm_jax.data.folder import FolderImages
from vfm_jax.data.latent_pipeline import LatentPipeline
from vfm_jax.data.latents import Latents
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.experiment import Checkpoints, Data, Experiment
from vfm_jax.latents import LatentDecoder
from vfm_jax.models.dit import DiT
from vfm_jax.objectives.denoise import Denoise
from vfm_jax.ops import noise
from vfm_jax.ops.diffusion import Gaussian
from vfm_jax.sampling import Sampling

STEPS = {'': 400_000, '7m': 7_000_000}
WEIGHTS = {'': noise.unit_weight, 'min_snr': noise.min_snr, 'p2': noise.p2}


def get_config(arg=None):
  """Return the recipe for a pod, `gpu8` or `gpu1`, after `7m` and a weight."""
  parts = itertools.product(STEPS, WEIGHTS, ('', 'gpu8', 'gpu1'))
  steps, weight, _ = variant(arg, {'-'.join(filter(None, p)): p for p in parts})
  return ref(
    Experiment,
    objective=ref(
      Denoise,
      denoiser=ref(DiT, size='S', patch=2, dtype='bfloat16', scan=True),
      process=ref(Gaussian, weight=bind(WEIGHTS[weight])),
      data='latent',
      # The released code guides the noise of three channels of four.
      sampling=ref(
        Sampling,
        sampler=bind(samplers.ddpm, steps='250'),
        scale=4.0,
        channels=3,
      ),
      decoder=ref(LatentDecoder, path='data/sd-vae-ft-ema'),
    ),
    data=ref(
      Data,
      train=ref(
        LatentPipeline,
        source=ref(Latents, root='data/imagenet256_latents/train'),
        shape=(32, 32, 4),
        labels=('label',),
      ),
      workers=8,
    ),
    latents={
      'train': ref(
        Pipeline,
        source=ref(FolderImages, root='data/imagenet/train'),
        clip=bind(clips.uniform, frames=1),
        transform=bind(augment.center_crop, size=256),
        path='latents.train',
      )
    },
    optim=ref(
      optim.Optimizer,
      lr=bind(schedules.constant, value=1e-4),
      method=bind(optim.adam, b2=0.999),
      weight_decay=0.0,
    ),
    batch_size=256,
    steps=STEPS[steps],
    ema=(0.9999,),
    eval_ema=0.9999,
    eval_every=50_000,
    checkpoint=ref(
      Checkpoints, every_steps=5000, every_minutes=30.0, keep_every_steps=50000
    ),
    log_every=100,
    watchdog_s=1800.0,
  )
