"""Check the U-Net: its sizes, its first output, what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax import config, sharding
from vfm_jax.models.unet import UNet
from vfm_jax.nn import mixer
from vfm_jax.nn.mixer import Mixing

MIXING = Mixing((0.5, 0.25), (2, 1), 4)
SMALL = dict(
  width=8, multipliers=(1, 2), blocks=1, spatial=(1,), head_dim=4, groups=4
)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 8, 8, 3)).astype(np.float32)
T = np.array([3.0, 700.0], np.float32)


def shapes(model, x=X, t=T, *args, **kwargs):
  make = lambda: model.init(jax.random.key(0), x, t, *args, **kwargs)  # noqa: E731
  return jax.eval_shape(make)['params']


def count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(('width', 'millions'), [(224, 274.06), (128, 89.5)])
def test_sizes_of_latent_diffusion(width, millions):
  x = jnp.zeros((1, 64, 64, 3))
  params = shapes(UNet(width=width), x, jnp.zeros(1))
  assert count(params) / 1e6 == pytest.approx(millions, abs=0.05)
  sharding.infer({'denoiser': params}, {'data': 1, 'fsdp': 8})


def test_size_of_a_mixing_expert():
  model = UNet(mixing=mixer.stages(3), mixer_mlp=0.0)
  params = shapes(model, jnp.zeros((1, 64, 64, 3)), jnp.zeros(1))
  # MEME's are said to have 82.9 M on average.
  assert count(params) / 1e6 == pytest.approx(88.3, abs=0.05)
  sharding.infer({'denoiser': params}, {'data': 1, 'fsdp': 8})


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, *args, **kwargs):
  return model.apply({'params': params}, *args, **kwargs)


def lively(model, *args, **kwargs):
  draw = lambda s: 0.2 * RNG.normal(size=s.shape).astype(np.float32)  # noqa: E731
  return jax.tree.map(draw, shapes(model, *args, **kwargs))


def test_zero_at_first():
  model = UNet(**SMALL, learn_sigma=True)
  start = functools.partial(model.init_with_output, jax.random.key(0), X, T)
  out, _ = jax.eval_shape(start)
  assert out.shape == (2, 8, 8, 6) == (*X.shape[:3], model.out_channels)
  assert out.dtype == jnp.float32
  # The compiler drops all but the last layer.
  last = jax.jit(lambda: start()[1]['params']['conv_out'])()
  assert not any(np.any(x) for x in jax.tree.leaves(last))


def test_attention_or_mixers():
  names = {'down_1_0_mix', 'mid_mix', 'up_1_0_mix', 'up_1_1_mix'}
  plain, mixed = (shapes(UNet(**SMALL, mixing=m)) for m in (None, MIXING))
  for params in (plain, mixed):
    assert {n for n in params if n.endswith('mix')} == names
  assert set(plain['mid_mix']) == {'norm', 'qkv', 'proj'}
  assert set(mixed['mid_mix']) == {'norm1', 'mixer', 'norm2', 'mlp'}
  everywhere = {**SMALL, 'spatial': (0, 1)}
  params = shapes(UNet(**everywhere, mixing=MIXING, mixer_mlp=0.0))
  assert 'mlp' not in params['up_0_1_mix']
  qkv = lambda name: params[name]['mixer']['qkv']['kernel'].shape  # noqa: E731
  # The same shares on both ways.
  assert qkv('down_0_0_mix') == qkv('up_0_1_mix') == (4, 3, 1, 4)
  assert qkv('down_1_0_mix') == qkv('up_1_1_mix') == (12, 3, 3, 4)


@pytest.mark.slow
@pytest.mark.parametrize('mixing', [None, MIXING])
def test_everything_learns_and_counts(mixing):
  model = UNet(**SMALL, mixing=mixing, num_classes=3, label_dropout=0.1)
  y = np.array([0, 2])
  params = lively(model, X, T, y)

  @jax.jit
  def both(params):
    return jax.value_and_grad(
      lambda p: (model.apply({'params': p}, X, T, y) ** 2).mean()
    )(params)

  value, grads = both(params)
  assert np.isfinite(value)
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    assert np.any(leaf), path


def test_labels_and_examples():
  fields = {**SMALL, 'spatial': (), 'multipliers': (1, 1)}
  model = UNet(**fields, mixing=MIXING, num_classes=3, label_dropout=0.1)
  null, keep = np.array([3, 2]), np.zeros(2, bool)
  params = lively(model, X, T, null)
  out = run(model, params, X, T, null, drop=keep)
  dropped = np.array([True, False])
  same = run(model, params, X, T, np.array([0, 2]), drop=dropped)
  np.testing.assert_allclose(same, out, atol=1e-5)
  # Time, label and image of an example are its own affair.
  for other in ((X[::-1], T, null), (X, T[::-1], null), (X, T, null - 1)):
    other = [
      np.stack([b[0], a[1]]) for a, b in zip((X, T, null), other, strict=True)
    ]
    change = np.abs(run(model, params, *other, drop=keep) - out)
    assert change[0].max() > 1e-3
    assert change[1].max() < 1e-4


@pytest.mark.parametrize(
  ('fields', 'x', 'match'),
  [
    ({}, X[:, :7], r'sides 2 divides.*denoiser\.multipliers.*7 x 8'),
    ({}, X[..., :2], r'denoiser\.channels'),
    ({}, X[:, None], r'expected images \[B, H, W, 3\]'),
    (dict(groups=3), X, r'3 groups divide.*found 8'),
    (dict(spatial=(2,)), X, r'denoiser\.spatial. in \[0, 1\]'),
    (dict(head_dim=5), X, r'heads of 5 divide'),
    (dict(mixing=mixer.stages(0)), X, r'denoiser\.mixing\.shares.*2 stages'),
    (dict(mixing=Mixing((0.5, 0.5), (1, 3), 4)), X, r'sides 3 divides'),
  ],
)
def test_errors(fields, x, match):
  with pytest.raises(ValueError, match=match):
    shapes(UNet(**{**SMALL, **fields}), x)


def test_errors_of_the_condition():
  with pytest.raises(ValueError, match=r'times \[2\], found shape \(2, 1\)'):
    shapes(UNet(**SMALL), X, T[:, None])
  with pytest.raises(ValueError, match=r'denoiser\.num_classes'):
    shapes(UNet(**SMALL), X, T, np.array([0, 1]))
  with pytest.raises(ValueError, match=r'denoiser\.label_dropout'):
    shapes(UNet(**SMALL, num_classes=3), X, T)


def test_a_recipe_can_name_it():
  node = config.ref(UNet, mixing=config.ref(mixer.stages, expert=1))
  assert config.build(node).mixing.pools == (2, 2, 1, 1)
