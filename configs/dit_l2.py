"""Train DiT-L/2 on latents of ImageNet at 256 x 256: `dit_s2.py`, larger.

    python -m vfm_jax.main --config=configs/dit_l2.py \
      --config.data.train.source.root=DIR \
      --config.objective.decoder.path=VAE

Folders and variants are those of `dit_s2.py`. Recipe: DiT (arXiv:2212.09748);
FID-50K at 400 K steps without guidance 23.3. Ours: not run at full size.
"""

import pathlib

from vfm_jax.config import load


def get_config(arg=None):
  """Return the recipe; the variants are those of `dit_s2.py`."""
  base = pathlib.Path(__file__).with_name('dit_s2.py')
  config = load(f'{base}:{arg or ""}')
  config.objective.denoiser.size = 'L'
  config.accum = 4 if (arg or '').endswith('gpu1') else 1
  return config
