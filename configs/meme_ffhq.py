"""Train four denoisers, each for a range of noise levels, on FFHQ (MEME).

    python -m vfm_jax.main latents --config=configs/meme_ffhq.py --vae=VAE \
      --shards=16 --workdir=RUN --config.latents.train.source.root=IMAGES
    python -m vfm_jax.main --config=configs/meme_ffhq.py \
      --config.data.train.source.root=DIR

IMAGES is a folder of images; DIR is RUN/latents/train; VAE a folder of an
autoencoder of factor 4 and 3 channels as diffusers saves it, and
`objective.experts[0].decoder.path` shows pictures by it, '' none.

Variants: none for MEME, `same` for four equal networks with plain attention.
Recipe: MEME (arXiv:2306.04990) for 8 GPUs; FID 8.52 with 200 DDIM steps, and
9.58 for `same`, as second hand has it. MEME's code is not public. The number
of experts, how often they keep to their interval and the diffusion are as
reported. Reconstructed: shares and place of the mixers (`nn.mixer`); no MLP
after them, for which the reported 82.9 M parameters leave no room (ours have
86 to 88 M); KL in place of VQ latents; the experts' equal parts of a batch and
the optimizer, that of latent diffusion as we remember it. Ours: not run.
"""

from vfm_jax import optim, samplers, schedules
from vfm_jax.config import bind, ref, variant
from vfm_jax.data import augment, clips
from vfm_jax.data.folder import FolderImages
from vfm_jax.data.latent_pipeline import LatentPipeline
from vfm_jax.data.latents import Latents
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.experiment import Checkpoints, Data, Experiment
from vfm_jax.latents import LatentDecoder
from vfm_jax.models.unet import UNet
from vfm_jax.nn import mixer
from vfm_jax.objectives.denoise import Denoise
from vfm_jax.objectives.experts import Experts
from vfm_jax.ops.diffusion import Gaussian
from vfm_jax.ops.strata import SoftInterval
from vfm_jax.sampling import Sampling

# How often an expert keeps to its own noise levels, the cleanest first.
OWN = (0.8, 0.4, 0.2, 0.1)
BATCH = 256


def get_config(arg=None):
  """Return the recipe, or `same`."""
  mixes = variant(arg, {'': True, 'same': False})

  def expert(i):
    mixing = ref(mixer.stages, expert=i) if mixes else None
    return ref(
      Denoise,
      denoiser=ref(UNet, mixing=mixing, mixer_mlp=0.0, dtype='bfloat16'),
      process=ref(Gaussian, variance='small'),
      data='latent',
      label=None,
      times=ref(SoftInterval, interval=i, own=OWN[i]),
      sampling=ref(Sampling, sampler=bind(samplers.ddim, steps='200')),
      decoder=ref(LatentDecoder),
    )

  return ref(
    Experiment,
    objective=ref(Experts, experts=tuple(expert(i) for i in range(len(OWN)))),
    data=ref(
      Data,
      train=ref(
        LatentPipeline,
        source=ref(Latents, root='data/ffhq256_latents_f4/train'),
        shape=(64, 64, 3),
        labels=(),
      ),
      workers=8,
    ),
    latents={
      'train': ref(
        Pipeline,
        source=ref(FolderImages, root='data/ffhq', label=''),
        clip=bind(clips.uniform, frames=1),
        transform=bind(augment.center_crop, size=256),
        path='latents.train',
      )
    },
    optim=ref(
      optim.Optimizer,
      # 2e-6 for each example that a network sees in a step.
      lr=bind(schedules.constant, value=2e-6 * BATCH / len(OWN)),
      method=bind(optim.adam, b2=0.999),
      weight_decay=0.01,
    ),
    batch_size=BATCH,
    steps=635_000,
    ema=(0.9999,),
    eval_ema=0.9999,
    eval_every=50_000,
    checkpoint=ref(Checkpoints, every_steps=5000, keep_every_steps=50_000),
    log_every=100,
  )
