"""Train Switch-DiT, whose experts the noise level picks, on latents.

    python -m vfm_jax.main --config=configs/switch_dit.py:s2 \
      --config.data.train.source.root=DIR \
      --config.objective.decoder.path=VAE

Folders are those of `dit_s2.py`. Variants: `s2`, `b2`, `l2` or `xl2` for the
size, S by default; then `uw` for 8 intervals as tasks, weighed by their
uncertainty (ANT-UW, arXiv:2306.00354); then `ffhq` for FFHQ without labels in
place of ImageNet; then `gpu8` or `gpu1` as in `dit_s2.py`: `:l2-uw-gpu8`.

Recipe: Switch-DiT (arXiv:2403.09176), 3 experts a block of which 2 are used,
and the diffusion prior, with the weight 1; 400 K steps of 256, for 8 GPUs of
80 GB. FID-50K on ImageNet with a guidance scale of 1.5, S to XL: 33.99, 16.21,
8.78 and 8.76; as DiT 44.28, 27.96, 12.59 and 9.40. The schedule is the linear
one of the released command; that of the code without a command is cosine. For
FFHQ the released code has one label, here there is none. Ours: not run.
"""

import itertools
import pathlib

from vfm_jax.config import load, ref, variant
from vfm_jax.models.switch import switch
from vfm_jax.multitask import UncertaintyWeighting
from vfm_jax.objectives.prior import DiffusionPrior
from vfm_jax.ops.intervals import uniform
from vfm_jax.ops.strata import Stratified
from vfm_jax.optim import Group

SIZES = ('', 's2', 'b2', 'l2', 'xl2')


def get_config(arg=None):
  """Return the recipe for a size, tasks, data and hardware."""
  parts = itertools.product(
    SIZES, ('', 'uw'), ('', 'ffhq'), ('', 'gpu8', 'gpu1')
  )
  parts = {'-'.join(filter(None, p)): p for p in parts}
  size, tasks, data, hardware = variant(arg, parts)
  base = pathlib.Path(__file__).with_name(f'dit_{size or "s2"}.py')
  config = load(f'{base}:{hardware}')
  with config.unlocked():
    config.objective.denoiser.hooks = ref(switch)
    # The order of the columns is drawn anew for each batch, as released.
    config.objective.auxiliary = ref(DiffusionPrior, shuffle=0)
    # All channels are guided.
    config.objective.sampling.update(scale=1.5, channels=None)
    if tasks:
      eight = ref(uniform, count=8)
      config.objective.tasks = eight
      config.objective.times = ref(Stratified, intervals=eight)
      config.combine = ref(UncertaintyWeighting)
      rate = 0.025 / config.optim.lr.value
      config.optim.groups = (ref(Group, pattern='^combine/', lr_scale=rate),)
    if data:
      config.objective.denoiser.update(num_classes=0, label_dropout=0.0)
      config.objective.label = None
      config.objective.sampling.scale = 1.0
      config.data.train.source.root = 'data/ffhq256_latents/train'
      config.data.train.labels = ()
      config.latents.train.source.update(root='data/ffhq/train', label='')
  return config
