"""Train DiT-S/2 on latents of ImageNet as five tasks: `ant_l2.py`, smaller.

    python -m vfm_jax.main --config=configs/ant_s2.py:nash \
      --config.data.train.source.root=DIR \
      --config.objective.decoder.path=VAE

Folders are those of `dit_s2.py`; the released latents are of the autoencoder
of SDXL in place of that of Stable Diffusion. Variants: none for UW, `pcgrad`
and `nash`; then `snr`; see `ant_l2.py`.

Recipe: ANT (arXiv:2306.00354) as released, for one GPU: 800 K steps of 50.
FID-50K with a guidance scale of 1.5: `nash` 44.65, UW 48.40. The released
PCGrad projects a gradient on that of its own task too
(`--config.combine.against=all`) and leaves the average of the weights as it
was at first; neither is done here. Ours: not run.
"""

import itertools
import pathlib

from vfm_jax.config import load, variant


def get_config(arg=None):
  """Return the recipe for a method and intervals."""
  parts = itertools.product(('', 'pcgrad', 'nash'), ('', 'snr'))
  names = ('-'.join(filter(None, p)) for p in parts)
  name = variant(arg, {n: n for n in names})
  base = pathlib.Path(__file__).with_name('ant_l2.py')
  config = load(f'{base}:{name}')
  config.objective.denoiser.size = 'S'
  config.update(batch_size=50, steps=800_000)
  return config
