"""Compare with a random-weight VideoMAE of `transformers`, live."""

import jax
import numpy as np
import optax
import pytest

from vfm_jax import convert, readers
from vfm_jax.models.encoders import VideoViT
from vfm_jax.models.predictors import PixelDecoder
from vfm_jax.objectives.masked import IMAGENET_MEAN, IMAGENET_STD, Masked

pytestmark = pytest.mark.parity


def test_loss_predictions_and_gradients():
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  torch.manual_seed(0)
  config = transformers.VideoMAEConfig(
    image_size=32,
    patch_size=8,
    num_frames=4,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=192,
    decoder_hidden_size=32,
    decoder_num_hidden_layers=2,
    decoder_num_attention_heads=4,
    decoder_intermediate_size=128,
    layer_norm_eps=1e-6,
    use_mean_pooling=False,
    norm_pix_loss=True,
  )
  theirs = transformers.VideoMAEForPreTraining(config)
  theirs.decoder.norm.eps = 1e-6  # the released model's; not configurable
  with torch.no_grad():
    for p in theirs.parameters():
      p.add_(0.1 * torch.randn_like(p))
  rng = np.random.default_rng(0)
  video = rng.random((2, 4, 32, 32, 3), np.float32)
  mask = np.stack([np.tile(rng.permutation(16) >= 4, 2) for _ in range(2)])
  x = (video - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
  out = theirs(
    torch.tensor(x.transpose(0, 1, 4, 2, 3)),
    bool_masked_pos=torch.tensor(mask),
  )
  out.loss.backward()

  shared = dict(heads=4)
  objective = Masked(
    encoder=VideoViT(
      width=48, depth=3, patch=8, frames=4, image_size=32, **shared
    ),
    decoder=PixelDecoder(width=32, depth=2, **shared),
    mask=lambda keys, grid: mask,
  )
  batch = {'video': video, 'row': np.arange(2)}
  template, _ = jax.eval_shape(objective.init, jax.random.key(0), batch)

  def arrays(value):
    return {
      name: value(p).detach().numpy() for name, p in theirs.named_parameters()
    }

  params = convert.from_videomae(arrays(lambda p: p), template)
  # The conversion is linear, so that it also converts gradients.
  want = convert.from_videomae(arrays(lambda p: p.grad), template)

  @jax.jit
  def step(params):
    def loss(params):
      rng = jax.random.key(0)
      out = objective.loss(params, {}, batch, rng, train=True)
      return (out.sums / out.counts).sum()

    return jax.value_and_grad(loss)(params)

  loss, grads = step(params)
  np.testing.assert_allclose(loss, out.loss.item(), rtol=1e-4)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max()
    ),
    grads,
    want,
  )
  keys = jax.random.split(jax.random.key(0), 2)
  pred = jax.jit(objective.reconstruct)(params, video, keys).pred
  np.testing.assert_allclose(pred, out.logits.detach().numpy(), atol=1e-4)


def test_logits_and_gradients_of_the_fine_tuned_classifier():
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  torch.manual_seed(0)
  config = transformers.VideoMAEConfig(
    image_size=32,
    patch_size=8,
    num_frames=4,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=192,
    layer_norm_eps=1e-6,
    use_mean_pooling=True,
    num_labels=7,
  )
  theirs = transformers.VideoMAEForVideoClassification(config).eval()
  theirs.fc_norm.eps = 1e-6  # the released model's; not configurable
  with torch.no_grad():
    for p in theirs.parameters():
      p.add_(0.1 * torch.randn_like(p))
  rng = np.random.default_rng(0)
  video = rng.normal(size=(2, 4, 32, 32, 3)).astype(np.float32)
  labels = np.array([3, 5])
  out = theirs(
    torch.tensor(video.transpose(0, 1, 4, 2, 3)), labels=torch.tensor(labels)
  )
  out.loss.backward()

  model = VideoViT(
    width=48,
    depth=2,
    heads=4,
    patch=8,
    frames=4,
    image_size=32,
    pooling='mean',
    norm='pooled',
    num_classes=7,
  )
  shapes = jax.eval_shape(model.init, jax.random.key(0), video)['params']
  state, grads = (
    {name: value(p).numpy() for name, p in theirs.named_parameters()}
    for value in (lambda p: p.detach(), lambda p: p.grad)
  )
  params = readers.videomae(state, shapes, model)
  want = readers.videomae(grads, shapes, model)

  @jax.jit
  @jax.value_and_grad
  def loss(params):
    logits = model.apply({'params': params}, video)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean()

  value, grads = loss(params)
  np.testing.assert_allclose(value, out.loss.item(), rtol=1e-4)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max()
    ),
    grads,
    want,
  )
  # Without the head it is an encoder: the vector is what the head sees.
  encoder = model.clone(num_classes=0)
  del shapes['head']
  vector = encoder.apply(
    {'params': readers.videomae(state, shapes, encoder)}, video
  )
  kernel, bias = state['classifier.weight'], state['classifier.bias']
  np.testing.assert_allclose(
    vector @ kernel.T + bias, out.logits.detach().numpy(), atol=1e-4
  )
