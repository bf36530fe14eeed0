"""Pretrain UMT ViT-L, stage 1: `umt_b.py`, larger.

    python -m vfm_jax.main --config=configs/umt_l.py \
      --config.data.train.source.root=DIR \
      --config.data.train.source.csv=DIR/train.csv \
      --config.objective.teacher.path=FILE

FILE is CLIP ViT-L/14, which sees the frames at 196 pixels, so that its patches
are the student's. Variants: none for a TPU pod (parameters cut over 8 chips),
`:gpu8` and `:gpu1` for 8 GPUs or one of 80 GB. Recipe: UMT (arXiv:2303.16058);
fine-tuned it gives 90.3 % top-1 on Kinetics-400 there. Ours: not run at full
size.
"""

import pathlib

from vfm_jax.config import load, variant


def get_config(arg=None):
  """Return the recipe for a pod, `gpu8` or `gpu1`."""
  base = pathlib.Path(__file__).with_name('umt_b.py')
  config = load(f'{base}:{arg or ""}')
  accum, fsdp = variant(arg, {'': (1, 8), 'gpu8': (4, 8), 'gpu1': (32, 1)})
  config.objective.encoder.update(size='L', drop_path=0.2)
  config.objective.teacher.model.size = 'L/14'
  config.objective.teacher.path = 'weights/clip_vit_l_14.pt'
  config.accum = accum
  config.mesh.fsdp = fsdp
  return config
