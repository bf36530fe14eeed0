"""Compare with a random-weight V-JEPA 2 of `transformers`, live."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax import convert_vjepa
from vfm_jax.models.attentive import AttentiveClassifier, AttentivePooler
from vfm_jax.models.encoders import VideoViT
from vfm_jax.models.vjepa import LatentPredictor
from vfm_jax.objectives.latent import LatentPrediction
from vfm_jax.ops.blocks import Split

pytestmark = pytest.mark.parity

# Heads of 24 features: all of them turn. Heads of 16 in the predictor: not all.
SIZES = dict(
  patch_size=8,
  crop_size=32,
  frames_per_clip=4,
  tubelet_size=2,
  hidden_size=48,
  num_attention_heads=2,
  num_hidden_layers=2,
  pred_hidden_size=32,
  pred_num_attention_heads=2,
  pred_num_hidden_layers=2,
  pred_num_mask_tokens=3,
  num_pooler_layers=2,
)


def test_encoder_predictor_and_probe():
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  torch.manual_seed(0)
  config = transformers.VJEPA2Config(**SIZES, num_labels=5)
  theirs = transformers.VJEPA2ForVideoClassification(config).eval()
  with torch.no_grad():
    for p in theirs.parameters():
      p.add_(0.1 * torch.randn_like(p))
  rng = np.random.default_rng(0)
  video = rng.normal(size=(2, 4, 32, 32, 3)).astype('f')
  order = np.stack([rng.permutation(32) for _ in range(2)])
  seen, wanted = (np.sort(x, 1) for x in (order[:, :12], order[:, 12:22]))
  pixels = torch.tensor(video.transpose(0, 1, 4, 2, 3))
  with torch.no_grad():
    out = theirs.vjepa2(
      pixel_values_videos=pixels,
      context_mask=[torch.tensor(seen)],
      target_mask=[torch.tensor(wanted)],
    )
    logits = theirs(pixel_values_videos=pixels).logits.numpy()

  shared = dict(positions='rope_3d_tiled')
  split = Split(jnp.asarray(seen), jnp.asarray(wanted))
  objective = LatentPrediction(
    encoder=VideoViT(
      width=48,
      depth=2,
      heads=2,
      patch=8,
      frames=4,
      image_size=32,
      qkv_bias='full',
      **shared,
    ),
    predictor=LatentPredictor(
      width=32, depth=2, heads=2, mask_tokens=3, **shared
    ),
    masks=(lambda keys, grid: split,),
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
  )
  batch = {'video': video, 'row': np.arange(2)}
  template, extra = jax.eval_shape(objective.init, jax.random.key(0), batch)
  probe = AttentiveClassifier(
    5, AttentivePooler(heads=2, depth=3, norm_eps=1e-6)
  )
  state = {k: v.numpy() for k, v in theirs.state_dict().items()}
  parts = {True: {}, False: {}}
  for name, x in state.items():
    parts[name.startswith('vjepa2.')][name] = x
  params = objective.converted(parts[True], {**template, **extra})
  for a, b in zip(
    jax.tree.leaves(params['target']),
    jax.tree.leaves(params['encoder']),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)

  @jax.jit
  def forward(params):
    # Theirs encodes all tokens and predicts from those that are seen.
    encoded = objective.encode(params, video)
    some = jnp.take_along_axis(encoded, split.visible_idx[..., None], 1)
    # Theirs takes the second mask token, whatever is asked for.
    return encoded, objective.predict(params, video, some, split, 1)

  encoded, pred = forward(params)
  np.testing.assert_allclose(
    encoded, out.last_hidden_state.numpy(), rtol=1e-4, atol=1e-4
  )
  np.testing.assert_allclose(
    pred,
    out.predictor_output.last_hidden_state.numpy(),
    rtol=1e-4,
    atol=1e-4,
  )
  shapes = jax.eval_shape(probe.init, jax.random.key(0), encoded)['params']
  weights = convert_vjepa.from_probe(parts[False], shapes)
  got = jax.jit(probe.apply)({'params': weights}, encoded)
  np.testing.assert_allclose(got, logits, rtol=1e-4, atol=1e-4)


def test_training_files_of_the_released_code(tmp_path):
  """Parts side by side, their names behind those of wrappers."""
  torch = pytest.importorskip('torch')
  parts = {
    part: {f'module.backbone.{name}': torch.full((2,), float(i))}
    for i, (part, name) in enumerate(
      (
        ('encoder', 'norm.weight'),
        ('predictor', 'predictor_norm.weight'),
        ('target_encoder', 'norm.weight'),
      )
    )
  }
  path = tmp_path / 'vitl16.pth.tar'
  torch.save({**parts, 'epoch': 3, 'opt': {'state': {}}}, path)
  state = convert_vjepa.read(path)
  assert {k: float(v[0]) for k, v in state.items()} == {
    'encoder.norm.weight': 0.0,
    'predictor.predictor_norm.weight': 1.0,
    'target_encoder.norm.weight': 2.0,
  }
