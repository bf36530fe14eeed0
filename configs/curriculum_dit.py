"""Train DiT-B/2 on latents of ImageNet, the noisiest levels first (curriculum).

    python -m vfm_jax.main --config=configs/curriculum_dit.py \
      --config.data.train.source.root=DIR \
      --config.objective.decoder.path=VAE

Folders are those of `dit_s2.py`. Variants: none begins with the easiest levels,
`anti` with the hardest, the cleanest, `none` has all from the start, for
comparison; then `snr` for clusters that are close in log-SNR, `flow` for
SiT-B/2, or `logit` for SiT-B/2 with logit-normal times and clusters that are
equally likely; then `gpu8` or `gpu1` as in `dit_s2.py`: `:anti-flow-gpu8`.

Recipe: the denoising curriculum (arXiv:2403.10348), 20 equal clusters, the next
one after more than 200 steps without a smaller loss, as second hand has it. Its
code is not public, and we know no number of it. Reconstructed: what loss is
compared, and that it is not smoothed; the step's mean is noisy, so that a stage
lasts a few times 200 steps. Size, data and all else are those of DiT and SiT,
which may differ from the paper's. Ours: not run.
"""

import itertools
import pathlib

from vfm_jax import solvers
from vfm_jax.config import bind, load, ref, variant
from vfm_jax.ops.clustering import by_density, by_log_snr
from vfm_jax.ops.curriculum import Curriculum
from vfm_jax.ops.interpolants import Interpolant, logit_normal

ORDERS = {'': 'easy_to_hard', 'anti': 'hard_to_easy', 'none': 'none'}


def get_config(arg=None):
  """Return the recipe for an order, a process and hardware."""
  kinds = ('', 'snr', 'flow', 'logit')
  parts = itertools.product(ORDERS, kinds, ('', 'gpu8', 'gpu1'))
  parts = {'-'.join(filter(None, p)): p for p in parts}
  order, kind, hardware = variant(arg, parts)
  base = pathlib.Path(__file__).with_name('dit_b2.py')
  config = load(f'{base}:{hardware}')
  with config.unlocked():
    times = config.objective.times = ref(Curriculum, order=ORDERS[order])
    if kind == 'snr':
      times.clusters = ref(by_log_snr, count=20)
    if kind in ('flow', 'logit'):
      config.objective.process = ref(Interpolant)
      config.objective.sampling.sampler = bind(solvers.sde)
    if kind == 'logit':
      config.objective.process.density = bind(logit_normal)
      times.clusters = ref(by_density, count=20, mean=0.0, scale=1.0)
  return config
