"""Train SiT-XL/2 on latents of ImageNet at 256 x 256: `dit_xl2.py` with flow.

    python -m vfm_jax.main --config=configs/sit_xl2.py \
      --config.data.train.source.root=DIR \
      --config.objective.decoder.path=VAE

Folders are those of `dit_s2.py`. Variants: none for a TPU pod, `gpu8` and
`gpu1` for 8 GPUs or one of 80 GB, before it `7m` for 7 M steps in place of
400 K. Recipe: SiT (arXiv:2401.08740): linear path, velocity, and 250 steps of
the SDE with the diffusion sigma. FID-50K at 7 M steps and a guidance scale of
1.5 (`--config.objective.sampling.scale=1.5`) 2.06. Ours: not run at full size.
"""

import itertools
import pathlib

from vfm_jax import solvers
from vfm_jax.config import bind, load, ref, variant
from vfm_jax.ops.interpolants import Interpolant


def get_config(arg=None):
  """Return the recipe for a pod, `gpu8` or `gpu1`, after `7m`."""
  parts = itertools.product(('', '7m'), ('', 'gpu8', 'gpu1'))
  name = variant(
    arg, {n: n for n in ('-'.join(filter(None, p)) for p in parts)}
  )
  base = pathlib.Path(__file__).with_name('dit_xl2.py')
  config = load(f'{base}:{name}')
  config.objective.unlock()
  config.objective.process = ref(Interpolant)
  config.objective.sampling.sampler = bind(solvers.sde)
  return config
