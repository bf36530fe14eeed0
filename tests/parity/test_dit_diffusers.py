"""Compare with a random-weight DiT of `diffusers`, live."""

import jax
import numpy as np
import pytest

from vfm_jax import convert_dit

pytestmark = pytest.mark.parity


@pytest.fixture(scope='module')
def theirs():
  torch = pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  torch.manual_seed(0)
  model = diffusers.DiTTransformer2DModel(
    num_attention_heads=4,
    attention_head_dim=16,
    in_channels=4,
    out_channels=8,
    num_layers=3,
    sample_size=8,
    patch_size=2,
    num_embeds_ada_norm=10,
    # Of the norm before the MLP alone; the others have it in any case.
    norm_eps=1e-6,
  )
  with torch.no_grad():
    for p in model.parameters():
      p.add_(0.1 * torch.randn_like(p))
    # Each block has a copy of the embedders; a released model has one.
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
      block.norm1.emb.load_state_dict(first)
      # diffusers spaces the 128 frequencies by 1 / 127, the released model
      # by 1 / 128; the weights are made for the latter.
      block.norm1.emb.time_proj.downscale_freq_shift = 0
  return model.eval()


def test_forward(theirs, tmp_path):
  import torch

  theirs.save_pretrained(tmp_path)
  model, state = convert_dit.read_diffusers(tmp_path)
  shape = (2, 8, 8, 4)
  rng = np.random.default_rng(0)
  x = rng.standard_normal(shape).astype(np.float32)
  t, y = np.array([3.0, 980.0], np.float32), np.array([1, 10])
  template = jax.eval_shape(model.init, jax.random.key(0), x, t, y)['params']
  params = convert_dit.from_dit(state, template)
  with torch.no_grad():
    want = theirs(
      torch.tensor(x.transpose(0, 3, 1, 2)),
      timestep=torch.tensor(t),
      class_labels=torch.tensor(y),
    ).sample
  out = jax.jit(model.apply)({'params': params}, x, t, y)
  want = want.numpy().transpose(0, 2, 3, 1)
  assert out.shape == want.shape == (2, 8, 8, 8)
  np.testing.assert_allclose(
    out, want, rtol=1e-4, atol=1e-4 * np.abs(want).max()
  )
