import jax
import numpy as np
import pytest

from vfm_jax.models.encoders import VideoViT
from vfm_jax.objectives import base
from vfm_jax.objectives.encode import Encoder

TINY = dict(width=16, depth=1, heads=2, patch=8, frames=2, image_size=16)


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(0)
  return {'video': rng.integers(0, 256, (2, 2, 16, 16, 3), np.uint8)}


def test_embeddings_and_tokens_of_pretrained_and_fine_tuned(batch):
  pretrained = Encoder(VideoViT(**TINY))
  assert isinstance(pretrained, base.Objective)
  assert isinstance(pretrained, base.Embeds)
  assert isinstance(pretrained, base.EmbedsTokens)
  tuned = Encoder(
    VideoViT(**TINY, pooling='mean', norm='pooled'),
    VideoViT(**TINY, norm='none'),
  )

  @jax.jit
  def compute(rng):
    outs = []
    for objective in (pretrained, tuned):
      params, extra = objective.init(rng, batch)
      assert not extra
      outs += [objective.tokens(params, batch), objective.embed(params, batch)]
    return outs

  tokens, mean, plain, normed = (
    np.asarray(x) for x in compute(jax.random.key(0))
  )
  np.testing.assert_allclose(tokens.mean(1), mean, atol=1e-6)
  assert tokens.shape == plain.shape == (2, 4, 16)
  # A norm of the mean, with random weights plain.
  x = plain.mean(1)
  x = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
  np.testing.assert_allclose(normed, x, atol=1e-4)


def test_pixels_are_normalised(batch):
  objective = Encoder(VideoViT(**TINY), mean=(0.5,) * 3, std=(0.25,) * 3)
  x = objective._video(batch)
  want = (batch['video'] / 255.0 - 0.5) / 0.25
  np.testing.assert_allclose(x, want, atol=1e-5)


def test_what_it_can_not_do(batch):
  objective = Encoder(VideoViT(**TINY, pooling='mean'))
  params, _ = jax.eval_shape(objective.init, jax.random.key(0), batch)
  with pytest.raises(ValueError, match='is not trained; it is for the verbs'):
    objective.loss(params, {}, batch, jax.random.key(0), train=True)
  with pytest.raises(ValueError, match=r'found \(2, 16\); set .*token_view'):
    jax.eval_shape(objective.tokens, params, batch)
  with pytest.raises(ValueError, match=r'expected `objective\.read`'):
    objective.converted({}, params)
