"""Pretrain an encoder of TWLV-I's size B on pixels: a reconstruction.

    python -m vfm_jax.main --config=configs/twlv_b.py \
      --config.data.train.source.root=DIR \
      --config.data.train.source.csv=DIR/train.csv

Variants: none for a TPU pod, `:gpu8` and `:gpu1` for 8 GPUs or one of 80 GB.

From the TWLV-I report (arXiv:2408.11318): a plain ViT of 86 M parameters,
trained from scratch by masked modelling, 16 frames at probing; the corpora
(K710, HowTo360K, WebVid10M and about 15 M images), of which the list that you
give takes the place. The report discloses no patch size, mask, target,
optimiser or length: all of these are ours, taken from VideoMAE with a mask
ratio of 0.8 and 100,000 steps. The target here is normalised pixels; frozen
teachers are not part of this recipe. Ours: not run at full size; the report's
numbers (kNN 57.5 % on Kinetics-400) are of their model, not of this one.
"""

import pathlib

from vfm_jax.config import load


def get_config(arg=None):
  """Return the recipe for a pod, `gpu8` or `gpu1`."""
  base = pathlib.Path(__file__).with_name('videomae_b.py')
  config = load(f'{base}:{arg or ""}')
  config.objective.mask.ratio = 0.8
  config.data.train.source.root = 'data/videos'
  config.data.train.source.csv = 'data/videos/train.csv'
  config.optim.lr.warmup_fraction = 0.05
  config.steps = 100_000
  return config
