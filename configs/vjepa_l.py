"""Pretrain V-JEPA ViT-L on K710, SSv2 and HowTo100M.

    python -m vfm_jax.main --config=configs/vjepa_l.py \
      --config.data.train.source.root=DIR \
      --config.data.train.source.csv=DIR/train.csv

Variants: none for a TPU pod, `:gpu8` for 8 GPUs of 80 GB, `:h` for ViT-H on a
pod. Recipe: V-JEPA (arXiv:2404.08471), 90,000 steps of schedules that
would last for 112,500; with a frozen encoder and an attentive probe it gives
80.8 % top-1 on Kinetics-400 and 69.5 % on SSv2 there (H: 82.0 % and 71.4 %).
Fixed lengths of masks are ours (`ops.blocks`). Ours: not run at full size.
"""

from vfm_jax import optim, schedules
from vfm_jax.config import bind, ref, variant
from vfm_jax.data import augment, clips
from vfm_jax.data.folder import FolderCSV
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.experiment import Checkpoints, Data, Experiment
from vfm_jax.models.encoders import VideoViT
from vfm_jax.models.vjepa import LatentPredictor
from vfm_jax.objectives.latent import LatentPrediction
from vfm_jax.ops.blocks import MultiBlock


def get_config(arg=None):
  """Return the recipe for a pod, `gpu8` or `h`."""
  size, accum, fsdp, remat = variant(
    arg,
    {
      '': ('L', 1, 8, 'none'),
      'gpu8': ('L', 8, 8, 'full'),
      'h': ('H', 1, 8, 'none'),
    },
  )
  warmup = 12_000
  compute = dict(dtype='bfloat16', scan=True, remat=remat)
  encoder = dict(positions='sincos_3d', qkv_bias='full', init_scheme='normal')

  crop = bind(augment.random_resized_crop, scale=(0.3, 1.0), ratio=(0.75, 1.35))

  # Of two blocks that span most of each slice; the other is the default.
  long = dict(num_blocks=2, spatial_scale=(0.7, 0.7), context=0.07, targets=0.7)

  def ahead(**kwargs):
    cosine = bind(schedules.warmup_cosine, **kwargs)
    return bind(schedules.stretched, schedule=cosine, scale=1.25, ahead=1)

  config = ref(
    Experiment,
    objective=ref(
      LatentPrediction,
      encoder=ref(VideoViT, size=size, **encoder, **compute),
      predictor=ref(LatentPredictor, heads=16, **compute),
      masks=(ref(MultiBlock), ref(MultiBlock, **long)),
      momentum=bind(
        schedules.linear, total_steps=112_500, peak=0.998, final=1.0
      ),
      # As released: a second initialisation undoes the first.
      rescale=False,
    ),
    data=ref(
      Data,
      train=ref(
        Pipeline,
        source=ref(
          FolderCSV,
          root='data/videomix2m',
          csv='data/videomix2m/train.csv',
          layout='list',
        ),
        clip=bind(clips.vjepa_train),
        transform=ref(
          augment.Compose, transforms=(crop, bind(augment.horizontal_flip))
        ),
      ),
      workers=16,
    ),
    optim=ref(
      optim.Optimizer,
      lr=ahead(peak=6.25e-4, final=1e-6, start=2e-4, warmup_steps=warmup),
      weight_decay=ahead(peak=0.04, final=0.4),
      method=bind(optim.adam, b2=0.999),
      decays=optim.decay_tokens,
      clip_norm=10.0,
      clip_apart=('^encoder/', '^predictor/'),
      clip_from=warmup,
    ),
    batch_size=3072,
    steps=90_000,
    accum=accum,
    checkpoint=ref(Checkpoints, every_steps=1000, keep_every_steps=15_000),
    log_every=50,
    watchdog_s=1800.0,
  )
  config.mesh.fsdp = fsdp
  return config
