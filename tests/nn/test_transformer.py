import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vfm_jax.nn import transformer as tr

KEYS = jax.random.split(jax.random.key(3), 4)
X = jax.random.normal(jax.random.key(0), (4, 5, 16))


def stack(**kwargs):
  return tr.Stack(3, tr.Block(2, 32, layer_scale=0.5), drop_path=0.5, **kwargs)


@pytest.fixture(scope='module')
def params():
  return jax.jit(stack().init)(jax.random.key(1), X)['params']


def run(module, params):
  def loss(params):
    out, taps = module.apply({'params': params}, X, KEYS, taps=(0, -1))
    return jnp.sin(out).sum(), (out, taps)

  (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  return out, grads


@pytest.fixture(scope='module')
def plain(params):
  return run(stack(), params)


@pytest.mark.parametrize(
  ('scan', 'remat'),
  [
    (False, 'full'),
    (True, 'none'),
    (True, 'dots'),
    pytest.param(False, 'dots', marks=pytest.mark.slow),
    pytest.param(True, 'full', marks=pytest.mark.slow),
  ],
)
def test_scan_and_remat_change_nothing(params, plain, scan, remat):
  module = stack(scan=scan, remat=remat)
  given = tr.stack_blocks(params) if scan else params
  shapes = jax.eval_shape(module.init, jax.random.key(0), X)['params']
  assert jax.tree.map(jnp.shape, given) == jax.tree.map(jnp.shape, shapes)
  out, grads = run(module, given)
  if scan:
    grads = tr.unstack_blocks(grads)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
    (out, grads),
    plain,
  )
  np.testing.assert_array_equal(out[0], out[1][1])


def test_scanned_layers_start_different():
  params = jax.jit(stack(scan=True).init)(jax.random.key(1), X)['params']
  kernel = params['blocks']['attn']['qkv']['kernel']
  assert kernel.shape == (3, 16, 3, 2, 8)
  assert np.abs(kernel[0] - kernel[1]).max() > 0.1


def test_stack_and_unstack_are_inverse(params):
  tree = {'encoder': params, 'x': jnp.ones(2)}
  back = tr.unstack_blocks(tr.stack_blocks(tree))
  jax.tree.map(np.testing.assert_array_equal, back, tree)


def test_drop_path_is_linear_in_depth_and_off_without_keys(params):
  @jax.jit
  def apply(x, keys=None):
    return stack().apply({'params': params}, x, keys, taps=(0,))

  out, plain = apply(X)
  again, _ = apply(X)
  np.testing.assert_array_equal(out, again)
  dropped, taps = apply(X, KEYS)
  np.testing.assert_allclose(taps[0], plain[0], atol=1e-6)  # rate 0
  assert np.abs(dropped - out).max() > 1e-3
  # Each example by itself gives the same: microbatches change nothing.
  half, _ = apply(X[2:], KEYS[2:])
  np.testing.assert_allclose(half, dropped[2:], atol=1e-6)


def test_qkv_bias_modes():
  full = tr.Attention(2, qkv_bias='full')
  qv = tr.Attention(2, qkv_bias='qv')
  none = tr.Attention(2, qkv_bias='none')
  params = qv.init(jax.random.key(0), X)['params']
  params['q_bias'], params['v_bias'] = jnp.arange(16.0), jnp.arange(16.0) / 8
  want = qv.apply({'params': params}, X)
  fused = {k: v for k, v in params.items() if k in ('qkv', 'proj')}
  shapes = jax.eval_shape(none.init, jax.random.key(0), X)['params']
  assert jax.tree.structure(shapes) == jax.tree.structure(fused)
  q, v = (params[n].reshape(2, 8) for n in ('q_bias', 'v_bias'))
  # Whatever the bias of k, the softmax does not see it.
  for k in (jnp.zeros((2, 8)), jnp.ones((2, 8))):
    qkv = {**fused['qkv'], 'bias': jnp.stack([q, k, v])}
    out = full.apply({'params': {**fused, 'qkv': qkv}}, X)
    np.testing.assert_allclose(out, want, atol=1e-4)


def test_cosine_attention_ignores_the_length_of_q_and_k():
  module = tr.Attention(2, qkv_bias='none', cosine=True)
  params = module.init(jax.random.key(0), X)['params']
  np.testing.assert_allclose(params['log_scale'], np.log(10.0), rtol=1e-6)
  want = module.apply({'params': params}, X)
  kernel = params['qkv']['kernel'] * jnp.array([7.0, 3.0, 1.0])[:, None, None]
  other = {**params, 'qkv': {'kernel': kernel}}
  out = module.apply({'params': other}, X)
  np.testing.assert_allclose(out, want, atol=1e-5)
  clamped = [
    module.apply({'params': {**params, 'log_scale': jnp.full(2, s)}}, X)
    for s in (4.6052, 9.0)
  ]
  np.testing.assert_array_equal(*clamped)


def test_initialisation():
  params = tr.Block(2, 64).init(jax.random.key(0), X)['params']
  kernel = params['attn']['qkv']['kernel']
  bound = np.sqrt(6 / (16 + 48))  # Xavier of the fused [48, 16] matrix
  assert 0.9 * bound < np.abs(kernel).max() <= bound
  assert not np.any(params['attn']['q_bias'])
  assert not np.any(params['mlp']['fc1']['bias'])


def test_errors():
  with pytest.raises(ValueError, match='width 16 and 3 heads'):
    tr.Attention(3).init(jax.random.key(0), X)
  with pytest.raises(ValueError, match=r'from -3 to 2 .* found \(3,\)'):
    stack().init(jax.random.key(0), X, taps=(3,))


class Telling(nn.Module):
  """Add a number to x, and sow it."""

  often: int = 1

  @nn.compact
  def __call__(self, x):
    add = self.param('add', nn.initializers.normal(), (2,))
    for _ in range(self.often):
      self.sow('aux', 'added', add)
    return x + add.sum()


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_sown_values_are_stacked_in_the_order_of_layers(remat):
  x = jnp.zeros((1, 1, 2))
  params = tr.Stack(11, Telling()).init(jax.random.key(0), x)['params']
  want = np.stack([params[f'blocks_{i}']['add'] for i in range(11)])
  for scan, given in ((False, params), (True, tr.stack_blocks(params))):
    module = tr.Stack(11, Telling(), scan=scan, remat=remat)
    _, sown = module.apply({'params': given}, x, mutable=['aux'])
    found = tr.stack_sown(sown)
    assert list(found) == ['added']
    np.testing.assert_array_equal(found['added'], want)
  assert tr.stack_sown({}) == {}
  _, sown = Telling(2).init_with_output(jax.random.key(0), x)
  with pytest.raises(ValueError, match="sow 'added' once, found 'aux/added'"):
    tr.stack_sown({'aux': sown['aux']})
