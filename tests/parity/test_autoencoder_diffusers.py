"""Compare with a random-weight AutoencoderKL of `diffusers`, live."""

import jax
import numpy as np
import pytest

from vfm_jax import convert_vae

pytestmark = pytest.mark.parity


@pytest.fixture(scope='module')
def theirs():
  torch = pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  torch.manual_seed(0)
  model = diffusers.AutoencoderKL(
    block_out_channels=(16, 32, 48),
    down_block_types=('DownEncoderBlock2D',) * 3,
    up_block_types=('UpDecoderBlock2D',) * 3,
    layers_per_block=2,
    norm_num_groups=8,
  )
  with torch.no_grad():
    for p in model.parameters():
      p.add_(0.1 * torch.randn_like(p))
  return model.eval()


@pytest.mark.parametrize('size', [(32, 32), (24, 40)])
def test_moments_and_pictures(theirs, tmp_path, size):
  import torch

  theirs.save_pretrained(tmp_path)
  ours = convert_vae.load(tmp_path)
  rng = np.random.default_rng(0)
  x = rng.uniform(-1, 1, (2, *size, 3)).astype(np.float32)
  with torch.no_grad():
    posterior = theirs.encode(torch.tensor(x.transpose(0, 3, 1, 2)))
    posterior = posterior.latent_dist
    want = theirs.decode(posterior.mean).sample

  @jax.jit
  def run(params, x):
    moments = ours.model.apply({'params': params}, x, method='encode')
    out = ours.model.apply({'params': params}, moments.mean, method='decode')
    return moments, moments.std, out

  moments, std, out = run(ours.params, x)
  for found, wanted in (
    (moments.mean, posterior.mean),
    (moments.logvar, posterior.logvar),
    (std, posterior.std),
    (out, want),
  ):
    wanted = wanted.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(
      found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max()
    )


def test_export_loads_strictly(theirs, tmp_path):
  import torch

  theirs.save_pretrained(tmp_path)
  back = convert_vae.to_vae(convert_vae.load(tmp_path).params)
  theirs.load_state_dict(
    {k: torch.tensor(v) for k, v in back.items()}, strict=True
  )
  for name, tensor in theirs.state_dict().items():
    np.testing.assert_array_equal(tensor.numpy(), back[name])
