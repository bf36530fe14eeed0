"""Pretrain VideoMAE ViT-L on Kinetics-400: `videomae_b.py` with its changes.

    python -m vfm_jax.main --config=configs/videomae_l.py \
      --config.data.train.source.root=DIR \
      --config.data.train.source.csv=DIR/train.csv

Variants: none for a TPU pod (parameters cut over 8 chips), `:gpu8` and `:gpu1`
for 8 GPUs or one of 80 GB. Recipe: VideoMAE (arXiv:2203.12602), decoder of 12
blocks, 1,601-epoch schedule; fine-tuned it gives 85.2 % top-1 on Kinetics-400
there. Ours: not run at full size.
"""

import pathlib

from vfm_jax.config import load, variant


def get_config(arg=None):
  """Return the recipe for a pod, `gpu8` or `gpu1`."""
  base = pathlib.Path(__file__).with_name('videomae_b.py')
  config = load(f'{base}:{arg or ""}')
  # Without it 16 clips do not fit on a chip of a pod, see docs/scale.md.
  accum, fsdp, remat = variant(
    arg,
    {'': (1, 8, 'dots'), 'gpu8': (8, 8, 'none'), 'gpu1': (64, 1, 'none')},
  )
  epochs, videos = 1601, 240_000
  config.objective.encoder.update(size='L', remat=remat)
  config.objective.decoder.update(width=512, depth=12, heads=8, remat=remat)
  config.optim.lr.warmup_fraction = 40 / epochs
  config.steps = epochs * videos // config.batch_size
  config.accum = accum
  config.mesh.fsdp = fsdp
  return config
