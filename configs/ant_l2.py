"""Train DiT-L/2 on latents of ImageNet as five tasks of noise levels (ANT).

    python -m vfm_jax.main --config=configs/ant_l2.py \
      --config.data.train.source.root=DIR \
      --config.objective.decoder.path=VAE

Folders are those of `dit_s2.py`. Variants: none weighs the tasks by their
uncertainty (UW), `pcgrad` projects conflicts out of their gradients, `nash`
lets them bargain; then `snr` for intervals that are close in log-SNR in place
of equal ones; then `gpu1` for one GPU of 80 GB in place of 8: `:nash-snr-gpu1`.
`--config.objective.tasks.count=8` makes other numbers of intervals and slices.

Recipe: ANT (arXiv:2306.00354) as released: DiT-L/2 with UW alone, 400 K steps
of 240, a cosine schedule, the weights of the losses at a rate of 0.025; FID-50K
with a guidance scale of 1.5 5.695. PCGrad and Nash were released for DiT-S/2,
see `ant_s2.py`. The released trainers have equal intervals alone; that `snr`
takes the logarithm is ours, for without it nearly all levels are in one
interval. Ours: not run.
"""

import itertools
import pathlib

from vfm_jax.config import bind, load, ref, variant
from vfm_jax.multitask import Nash, PCGrad, UncertaintyWeighting
from vfm_jax.ops import noise
from vfm_jax.ops.clustering import by_log_snr
from vfm_jax.ops.intervals import uniform
from vfm_jax.ops.strata import Stratified
from vfm_jax.optim import Group


def get_config(arg=None):
  """Return the recipe for a method, intervals and hardware."""
  parts = itertools.product(('', 'pcgrad', 'nash'), ('', 'snr'), ('', 'gpu1'))
  parts = {'-'.join(filter(None, p)): p for p in parts}
  method, clusters, hardware = variant(arg, parts)
  base = pathlib.Path(__file__).with_name('dit_l2.py')
  config = load(f'{base}:{hardware}')
  with config.unlocked():
    config.objective.process.schedule = bind(noise.cosine)
    config.objective.sampling.scale = 1.5
    five = ref(uniform, count=5)
    if clusters:
      five = ref(by_log_snr, count=5, schedule=noise.cosine)
    config.objective.tasks = five
    config.objective.times = ref(Stratified, intervals=five)
    if method == 'pcgrad':
      config.combine = ref(PCGrad, mean=True)
    elif method == 'nash':
      config.combine = ref(Nash)
    else:
      config.combine = ref(UncertaintyWeighting)
      rate = 0.025 / config.optim.lr.value
      config.optim.groups = (ref(Group, pattern='^combine/', lr_scale=rate),)
    config.batch_size = 240
  return config
