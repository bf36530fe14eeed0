"""Train DiT-XL/2 on latents of ImageNet at 256 x 256: `dit_s2.py`, larger.

    python -m vfm_jax.main --config=configs/dit_xl2.py \
      --config.data.train.source.root=DIR \
      --config.objective.decoder.path=VAE

Folders and variants are those of `dit_s2.py`; parameters are cut over 8 chips
of a pod. Recipe: DiT (arXiv:2212.09748); FID-50K without guidance 19.5 at 400 K
steps and 9.62 at 7 M (`:7m`), where a scale of 1.5 gives 2.27. Ours: not run at
full size.
"""

import pathlib

from vfm_jax.config import load


def get_config(arg=None):
  """Return the recipe; the variants are those of `dit_s2.py`."""
  base = pathlib.Path(__file__).with_name('dit_s2.py')
  config = load(f'{base}:{arg or ""}')
  hardware = (arg or '').rpartition('-')[2]
  accum, fsdp, remat = {
    'gpu8': (1, 8, 'none'),
    'gpu1': (4, 1, 'none'),
  }.get(hardware, (1, 8, 'dots'))
  config.objective.denoiser.update(size='XL', remat=remat)
  config.accum, config.mesh.fsdp = accum, fsdp
  return config
