"""Pretrain V-JEPA 2 ViT-L: `vjepa_l.py` with its changes.

    python -m vfm_jax.main --config=configs/vjepa2_l.py \
      --config.data.train.source.root=DIR \
      --config.data.train.source.csv=DIR/train.csv

Variants: sizes none, `:h` and `:g`; `:long`, `:h-long` and `:g-long` are the
second phase, which goes on from `--config.warm_start.workdir=DIR` with 64
frames; layouts for a TPU pod. Recipe: V-JEPA 2 (arXiv:2506.09985), as released:
with a frozen encoder and an attentive probe it gives 73.7 % top-1 on SSv2 there
(g at 384 pixels: 77.3 %). Its clips are drawn from sets by weights, K710 .335,
SSv2 .1, HowTo100M .565; here a list is read as it stands. The released settings
of L and H give 10 epochs to the first phase, those of g 800 of 300 steps, which
all sizes take here (ours); our second phase starts the copy from the encoder
anew, and the optimiser too; the masks have fixed lengths (ours). Ours: not run
at full size.
"""

import pathlib

from vfm_jax import optim, schedules
from vfm_jax.config import bind, load, ref, variant
from vfm_jax.data import clips
from vfm_jax.experiment import WarmStart


def get_config(arg=None):
  """Return the recipe of a size and a phase."""
  size, second = variant(
    arg,
    {
      '-'.join(filter(None, (name, phase))): (size, bool(phase))
      for name, size in (('', 'L'), ('h', 'H'), ('g', 'g'))
      for phase in ('', 'long')
    },
  )
  base = pathlib.Path(__file__).with_name('vjepa_l.py')
  config = load(str(base))
  config.unlock()
  frames, pixels = (64 if second else 16), 256
  objective = config.objective
  objective.encoder.update(
    size=size,
    positions='rope_3d_tiled',
    frames=frames,
    image_size=pixels,
    remat='full' if second or size == 'g' else 'none',
  )
  if size == 'g':
    objective.encoder.update(heads=22, patch=16)
  objective.predictor.update(
    positions='rope_3d_tiled', heads=12, mask_tokens=10
  )
  objective.update(mask_token='shared', rescale=True)
  # A number in place of a schedule.
  del objective.momentum
  objective.momentum = 0.99925
  config.data.train.clip = bind(clips.vjepa_train, frames=frames, rate=4)
  config.data.train.transform.transforms[0].size = pixels
  peak, start, warmup, steps = 5.25e-4, 1e-4, 12_000, 240_000
  lr = bind(
    schedules.linear,
    peak=peak,
    final=peak,
    start=start,
    warmup_steps=warmup,
  )
  if second:
    steps = 12_000
    lr = bind(schedules.linear, peak=peak, final=1e-6)
    config.warm_start = ref(WarmStart, workdir='')
  config.optim = ref(
    optim.Optimizer,
    lr=bind(schedules.stretched, schedule=lr, ahead=1),
    weight_decay=0.04,
    method=bind(optim.adam, b2=0.999),
    decays=optim.decay_tokens,
  )
  config.steps = steps
  config.mesh.fsdp = 16 if size == 'g' else 8
  return config
