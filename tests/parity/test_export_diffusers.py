"""Load an exported denoiser with diffusers, and run it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax import export
from vfm_jax.models.dit import DiT
from vfm_jax.objectives.denoise import Denoise

pytestmark = pytest.mark.parity


def test_diffusers_loads_and_computes_the_same(tmp_path):
  torch = pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  model = DiT(width=48, depth=3, heads=4, patch=2, input_size=8, num_classes=10)
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, 8, 8, 4), np.float32)
  t, y = jnp.array([7.0, 900.0]), jnp.array([3, 10])
  params = jax.tree.map(
    lambda p: 0.1 * rng.standard_normal(p.shape, np.float32),
    model.init(jax.random.key(0), x, t, y)['params'],
  )
  export.write(
    Denoise(model), {'denoiser': params}, tmp_path, layout='diffusers'
  )
  theirs, info = diffusers.DiTTransformer2DModel.from_pretrained(
    tmp_path, output_loading_info=True
  )
  assert not any(info.values()), info
  for block in theirs.transformer_blocks:
    # diffusers spaces the frequencies of time by 1 / 127, the released model
    # by 1 / 128.
    block.norm1.emb.time_proj.downscale_freq_shift = 0
  with torch.no_grad():
    want = theirs.eval()(
      torch.tensor(x.transpose(0, 3, 1, 2)),
      torch.tensor([7, 900]),
      torch.tensor([3, 10]),
    ).sample.numpy()
  got = jax.jit(model.apply)({'params': params}, x, t, y)
  want = want.transpose(0, 2, 3, 1)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
