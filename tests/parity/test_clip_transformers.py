"""Compare with random-weight image towers of `transformers`, live."""

import jax
import numpy as np
import pytest

from vfm_jax import convert_umt
from vfm_jax.models.clip import ClipViT
from vfm_jax.nn.transformer import stack_sown

pytestmark = pytest.mark.parity


@pytest.mark.parametrize('projected', [True, False])
def test_tower(projected):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  torch.manual_seed(0)
  config = transformers.CLIPVisionConfig(
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=192,
    image_size=32,
    patch_size=8,
    projection_dim=40,
    attn_implementation='eager',
  )
  kind = 'CLIPVisionModelWithProjection' if projected else 'CLIPVisionModel'
  theirs = getattr(transformers, kind)(config)
  with torch.no_grad():
    for p in theirs.parameters():
      p.add_(0.1 * torch.randn_like(p))
  rng = np.random.default_rng(0)
  video = rng.standard_normal((2, 2, 32, 32, 3)).astype(np.float32)
  frames = video.reshape(4, 32, 32, 3).transpose(0, 3, 1, 2)
  with torch.no_grad():
    out = theirs(
      torch.tensor(frames), output_attentions=True, output_hidden_states=True
    )

  model = ClipViT(
    width=48,
    depth=3,
    heads=4,
    patch=8,
    features=40 if projected else 0,
    image_size=32,
    output='class',
  )
  template = jax.eval_shape(model.init, jax.random.key(0), video)['params']
  state = {k: v.detach().numpy() for k, v in theirs.state_dict().items()}
  params = convert_umt.from_clip(state, template)
  got, sown = model.apply({'params': params}, video, mutable=['attention'])
  want = out.image_embeds if projected else out.pooler_output
  np.testing.assert_allclose(
    got.reshape(4, -1), want.numpy(), rtol=1e-4, atol=1e-4
  )
  attention = stack_sown(sown['attention'])['first_query']
  for ours, layer in zip(attention, out.attentions, strict=True):
    np.testing.assert_allclose(
      ours, layer[:, :, 0].mean(1).numpy(), rtol=1e-4, atol=1e-6
    )
  # Taps are what the last block's output becomes, of earlier blocks.
  whole = model.clone(output='patches')
  taps = whole.apply({'params': params}, video, (0, 1), method='intermediate')
  norm = getattr(theirs, 'vision_model', theirs).post_layernorm
  for ours, hidden in zip(taps, out.hidden_states[1:], strict=False):
    with torch.no_grad():
      y = norm(hidden[:, 1:])
      y = theirs.visual_projection(y) if projected else y
    np.testing.assert_allclose(
      ours.reshape(y.shape), y.numpy(), rtol=1e-4, atol=1e-4
    )


def test_bicubic_is_that_of_torch():
  torch = pytest.importorskip('torch')
  from vfm_jax.ops import resize

  x = np.random.default_rng(0).random((2, 9, 7, 3), np.float32)
  for size in ((14, 4), (5, 12), (16, 16)):
    want = torch.nn.functional.interpolate(
      torch.tensor(x.transpose(0, 3, 1, 2)), size=size, mode='bicubic'
    )
    np.testing.assert_allclose(
      resize.bicubic(x, *size),
      want.numpy().transpose(0, 2, 3, 1),
      rtol=1e-5,
      atol=1e-5,
    )
