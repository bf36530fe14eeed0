"""Pretrain VideoMAE V2 ViT-g with dual masking.

    python -m vfm_jax.main --config=configs/videomaev2_g.py \
      --config.data.train.source.root=DIR \
      --config.data.train.source.csv=DIR/train.csv

Variants: none for a TPU pod (parameters cut over 16 chips), `:gpu8` for 8 GPUs
of 80 GB. Recipe: VideoMAE V2 (arXiv:2303.16727), 300 epochs of 1.35 M clips
with four crops each, which count as 1,200; fine-tuned it gives 87.2 % top-1 on
Kinetics-400 there. Differs from it in that the four crops of a clip are drawn
as clips of their own, in the order of an epoch each. Ours: not run at full
size.
"""

import pathlib

from vfm_jax.config import bind, load, variant
from vfm_jax.ops import masking


def get_config(arg=None):
  """Return the recipe for a pod or `gpu8`."""
  accum, fsdp = variant(arg, {'': (1, 16), 'gpu8': (64, 8)})
  base = pathlib.Path(__file__).with_name('videomae_b.py')
  config = load(str(base))
  videos, crops, epochs, total = 2048, 4, 300, 1_350_000
  config.objective.encoder.update(size='g', remat='full')
  config.objective.decoder.update(width=512, depth=4, heads=8)
  # The released model gives its decoder the encoder's hidden ratio.
  config.objective.decoder.mlp_ratio = 48 / 11
  config.objective.unlock()
  config.objective.decoder_mask = bind(masking.running_cell, ratio=0.5)
  config.data.train.source.root = 'data/unlabeled_hybrid'
  config.data.train.source.csv = 'data/unlabeled_hybrid/train.csv'
  # The rate follows the number of videos, not of crops.
  config.optim.lr.peak = 6e-4 * videos / 256
  config.optim.lr.final = 1e-5 * videos / 256
  config.optim.lr.warmup_fraction = 30 / epochs
  config.optim.clip_norm = 0.02
  config.batch_size = videos * crops
  config.steps = epochs * total // videos
  config.accum = accum
  config.mesh.fsdp = fsdp
  return config
