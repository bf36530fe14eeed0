"""Check the DiT whose blocks mix convolution and attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax import config, sharding
from vfm_jax.models.dit import DiT
from vfm_jax.nn import adaln
from vfm_jax.nn.mixer import Mixer, Mixing, thirds

MIXING = Mixing((0.5, 0.25), (2, 1), 4)
SMALL = dict(
  width=16, depth=2, heads=2, input_size=8, num_classes=0, label_dropout=0.0
)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 8, 8, 4)).astype(np.float32)
T = np.array([3.0, 700.0], np.float32)


def shapes(model, x=X):
  return jax.eval_shape(model.init, jax.random.key(0), x, T)['params']


def lively(model, x=X):
  draw = lambda s: 0.2 * RNG.normal(size=s.shape).astype(np.float32)  # noqa: E731
  return jax.tree.map(draw, shapes(model, x))


def test_parameters_are_those_of_each_depth():
  params = shapes(DiT(**SMALL, mixing=MIXING))
  plain = shapes(DiT(**SMALL))
  assert set(params) == set(plain)
  assert set(plain['blocks_1']) == {'attn', 'mlp', 'ada'}
  for i, low in enumerate((8, 12)):
    block = params[f'blocks_{i}']
    assert set(block) == {'mixer', 'mlp', 'ada'}
    assert block['mixer']['qkv']['kernel'].shape == (low, 3, low // 4, 4)
  mesh = {'data': 1, 'fsdp': 2, 'tensor': 1}
  sharding.infer({'denoiser': params}, mesh)


def test_blocks_of_equal_shares_have_parameters_of_their_own():
  deep = {**SMALL, 'depth': 4}
  params = shapes(DiT(**deep, mixing=MIXING))
  assert all('mixer' in params[f'blocks_{i}'] for i in range(4))


def test_a_block_is_that_of_dit_with_the_mixer_for_attention():
  context = adaln.Context(
    c=RNG.normal(size=(2, 1, 16)).astype(np.float32), grid=(1, 4, 4)
  )
  h = RNG.normal(size=(2, 16, 16)).astype(np.float32)
  block = adaln.AdaLNBlock(2, 32, mixer=MIXING.mixer(0))
  params = jax.tree.map(
    lambda s: 0.3 * RNG.normal(size=s.shape).astype(np.float32),
    jax.eval_shape(block.init, jax.random.key(0), h, context)['params'],
  )
  # Without the MLP's gate, the sixth part of the modulation.
  params['ada']['kernel'][:, 80:] = 0
  params['ada']['bias'][80:] = 0
  got = jax.jit(block.apply)({'params': params}, h, context)

  @jax.jit
  def by_hand(params, h):
    c = jax.nn.silu(context.c)
    ada = c @ params['ada']['kernel'] + params['ada']['bias']
    shift, scale, gate = np.split(np.arange(96), 6)[:3]
    z = h - h.mean(-1, keepdims=True)
    z = z / jnp.sqrt((z**2).mean(-1, keepdims=True) + 1e-6)
    z = z * (1 + ada[..., scale]) + ada[..., shift]
    mixer = Mixer(0.5, 2, 4)
    out = mixer.apply({'params': params['mixer']}, z.reshape(2, 4, 4, 16))
    return h + ada[..., gate] * out.reshape(h.shape)

  np.testing.assert_allclose(got, by_hand(params, h), atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize('remat', ['none', 'full'])
def test_learns_from_zero(remat):
  model = DiT(**SMALL, mixing=MIXING, remat=remat)
  params = lively(model)

  def loss(params):
    return (model.apply({'params': params}, X, T) ** 2).mean()

  grads = jax.jit(jax.grad(loss))(params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    assert np.any(leaf), path


def test_videos_mix_frame_by_frame():
  fields = dict(SMALL, frames=4, attention='factorised')
  video = RNG.normal(size=(2, 4, 8, 8, 4)).astype(np.float32)
  params = shapes(DiT(**fields, mixing=MIXING), video)
  assert {'mixer', 'attn_time'} <= set(params['blocks_0'])


def test_settings_that_do_not_go_together():
  with pytest.raises(ValueError, match=r'denoiser\.scan. False, found True'):
    shapes(DiT(**SMALL, mixing=MIXING, scan=True))
  hooks = adaln.Hooks(prefix=2)
  with pytest.raises(ValueError, match=r'denoiser\.hooks\.prefix. of 2'):
    shapes(DiT(**SMALL, mixing=MIXING, hooks=hooks))
  video = np.zeros((2, 4, 8, 8, 4), np.float32)
  with pytest.raises(ValueError, match="'factorised', found 'joint'"):
    shapes(DiT(**SMALL, mixing=MIXING, frames=4), video)


def test_a_recipe_can_name_it():
  node = config.ref(DiT, size='S', mixing=config.ref(thirds, expert=2))
  assert config.build(node).mixing.shares == (3 / 8, 1 / 4, 1 / 8)
