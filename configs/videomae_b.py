"""Pretrain VideoMAE ViT-B on Kinetics-400.

    python -m vfm_jax.main --config=configs/videomae_b.py \
      --config.data.train.source.root=DIR \
      --config.data.train.source.csv=DIR/train.csv

Variants: none for a TPU pod, `:gpu8` and `:gpu1` for 8 GPUs or one of 80 GB.
Recipe: VideoMAE (arXiv:2203.12602), 801-epoch schedule; fine-tuned it gives
80.0 % top-1 on Kinetics-400 there (1,600 epochs: 81.5 %). Ours: not run at
full size.
"""

from vfm_jax import optim, schedules
from vfm_jax.config import bind, ref, variant
from vfm_jax.data import augment, clips
from vfm_jax.data.folder import FolderCSV
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.experiment import Checkpoints, Data, Experiment
from vfm_jax.models.encoders import VideoViT
from vfm_jax.models.predictors import PixelDecoder
from vfm_jax.objectives.masked import Masked
from vfm_jax.ops import masking


def get_config(arg=None):
  """Return the recipe for a pod, `gpu8` or `gpu1`."""
  accum, remat = variant(
    arg, {'': (1, 'none'), 'gpu8': (4, 'none'), 'gpu1': (32, 'none')}
  )
  # The length of the published run, whatever the list that is given.
  batch, epochs, videos = 2048, 801, 240_000
  compute = dict(dtype='bfloat16', scan=True, remat=remat)
  return ref(
    Experiment,
    objective=ref(
      Masked,
      encoder=ref(VideoViT, size='B', **compute),
      decoder=ref(PixelDecoder, width=384, depth=4, heads=6, **compute),
      mask=bind(masking.tube, ratio=0.9),
    ),
    data=ref(
      Data,
      train=ref(
        Pipeline,
        source=ref(
          FolderCSV,
          root='data/kinetics400',
          csv='data/kinetics400/train.csv',
          layout='list',
        ),
        clip=bind(clips.videomae_pretrain, frames=16, stride=4),
        transform=bind(augment.multi_scale_crop, size=224),
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
