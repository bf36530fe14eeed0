"""Pretrain an encoder of TWLV-I's size L: `twlv_b.py`, larger.

    python -m vfm_jax.main --config=configs/twlv_l.py \
      --config.data.train.pipelines[0].source.root=DIR [... .csv=FILE] \
      --config.data.train.pipelines[1].source.root=IMAGES \
      --config.objective.teacher.path=FILE

Variants: none for a TPU pod (parameters cut over 8 chips), `:gpu8` and `:gpu1`
for 8 GPUs or one of 80 GB. From the report: a plain ViT of 307 M parameters;
what is theirs and what is ours stands in `twlv_b.py`; the larger teacher, CLIP
ViT-L/14, is ours too. Ours: not run at full size; the report's numbers (kNN
66.0 % on Kinetics-400) are of their model.
"""

import pathlib

from vfm_jax.config import load, variant


def get_config(arg=None):
  """Return the recipe for a pod, `gpu8` or `gpu1`."""
  base = pathlib.Path(__file__).with_name('twlv_b.py')
  config = load(f'{base}:{arg or ""}')
  accum, fsdp, remat = variant(
    arg,
    {'': (1, 8, 'dots'), 'gpu8': (8, 8, 'none'), 'gpu1': (64, 1, 'none')},
  )
  config.objective.encoder.update(size='L', drop_path=0.2, remat=remat)
  config.objective.predictor.remat = remat
  config.objective.teacher.model.size = 'L/14'
  config.objective.teacher.path = 'weights/clip_vit_l_14.pt'
  config.accum = accum
  config.mesh.fsdp = fsdp
  return config
