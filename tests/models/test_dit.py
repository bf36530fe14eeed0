import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vfm_jax import config, sharding
from vfm_jax.models.dit import DiT
from vfm_jax.nn import adaln, transformer
from vfm_jax.ops import positions, tokens

SMALL = dict(width=16, depth=1, heads=2, input_size=8, num_classes=5)
VIDEO = dict(SMALL, frames=4, tubelet=2, patch=4)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 8, 8, 4)).astype(np.float32)
V = RNG.normal(size=(2, 4, 8, 8, 4)).astype(np.float32)
T = np.array([3.0, 700.0], np.float32)
Y = np.array([1, 4])
ORDER = RNG.permutation(16)


def count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def shapes(model, x=X, y=Y, **kwargs):
  make = lambda: model.init(jax.random.key(0), x, T, y, **kwargs)  # noqa: E731
  return jax.eval_shape(make)['params']


def lively(model, x=X, **kwargs):
  """Return parameters with nothing at zero."""
  rng = np.random.default_rng(7)
  draw = lambda s: 0.2 * rng.normal(size=s.shape).astype(np.float32)  # noqa: E731
  return jax.tree.map(draw, shapes(model, x, **kwargs))


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, *args, **kwargs):
  return model.apply({'params': params}, *args, **kwargs)


@pytest.mark.parametrize(
  ('size', 'totals'),
  [
    ('S', (32_865_056, 32_920_448, 33_142_016)),
    ('B', (130_315_808, 130_426_496, 130_869_248)),
    ('L', (457_840_672, 457_988_224, 458_578_432)),
    ('XL', (674_834_720, 675_000_704, 675_664_640)),
  ],
)
def test_parameter_counts(size, totals):
  x = jnp.zeros((2, 32, 32, 4))
  for patch, total in zip((2, 4, 8), totals, strict=True):
    model = DiT(size=size, patch=patch, scan=True)
    assert count(shapes(model, x)) == total
    assert np.prod(model.built_grid) == (32 // patch) ** 2


def test_parameter_paths():
  params = shapes(DiT(**SMALL))
  names = {'patch_embed', 't_embed', 'y_embed', 'blocks_0', 'final'}
  assert set(params) == names
  assert set(params['blocks_0']) == {'attn', 'mlp', 'ada'}
  assert params['y_embed']['table'].shape == (6, 16)
  undropped = shapes(DiT(**SMALL, label_dropout=0.0))
  assert undropped['y_embed']['table'].shape == (5, 16)
  assert 'y_embed' not in shapes(DiT(**{**SMALL, 'num_classes': 0}), y=None)
  scanned = shapes(DiT(**VIDEO, scan=True, attention='factorised'), V)
  mesh = {'data': 1, 'fsdp': 2, 'tensor': 2}
  specs = sharding.infer({'denoiser': scanned}, mesh)['denoiser']
  assert tuple(specs['y_embed']['table'].spec) == (None, 'fsdp')


def test_zero_output_and_identity_blocks_at_first():
  model = DiT(**SMALL)

  @jax.jit
  def start(key):
    params = model.init(key, X, T, Y)['params']
    loss = lambda p: (model.apply({'params': p}, X, T, Y) - 1).sum()  # noqa: E731
    return run(model, params, X, T, Y), jax.grad(loss)(params)

  out, grads = start(jax.random.key(0))
  assert out.shape == (2, 8, 8, 8)
  assert out.dtype == jnp.float32
  assert not np.any(out)
  linear = grads['final'].pop('linear')
  assert np.any(linear['kernel'])
  assert not any(np.any(g) for g in jax.tree.leaves(grads))


def test_initial_statistics():
  model = DiT(width=64, depth=1, heads=2, patch=4, num_classes=999)
  x = jnp.zeros((1, 32, 32, 4))
  params = jax.jit(model.init)(jax.random.key(0), x, T[:1])['params']
  block = params['blocks_0']
  for kernel, fans in (
    (block['attn']['qkv']['kernel'], 64 + 192),  # one fused matrix
    (block['attn']['proj']['kernel'], 64 + 64),
    (block['mlp']['fc1']['kernel'], 64 + 256),
    (params['patch_embed']['kernel'], 4 * 16 + 64),  # a matrix too
  ):
    bound = np.sqrt(6 / fans)
    assert 0.98 * bound < np.abs(kernel).max() <= bound
  for kernel in (
    params['y_embed']['table'],
    params['t_embed']['fc1']['kernel'],
    params['t_embed']['fc2']['kernel'],
  ):
    assert np.std(kernel) == pytest.approx(0.02, rel=0.05)
    assert np.abs(kernel).max() > 0.05  # not truncated
  flat = jax.tree_util.tree_leaves_with_path(params)
  biases = [x for path, x in flat if path[-1].key == 'bias']
  assert len(biases) == 10
  assert not any(np.any(b) for b in biases)


def test_position_table():
  model = DiT(**{**SMALL, 'width': 8, 'input_size': 4})
  table = model.bind({})._positions((1, 2, 2))
  want = positions.sincos_2d((2, 2), 8, first='w')
  np.testing.assert_allclose(table, want, atol=1e-7)
  # Token 1 is at row 0, column 1: the column is in the first half.
  assert np.all(table[1, 4:] == table[0, 4:])
  assert np.any(table[1, :4] != table[0, :4])
  video = DiT(**{**VIDEO, 'width': 8}).bind({})._positions((2, 2, 2))
  between = np.diff(positions.sincos_1d(np.arange(2), 8), axis=0)
  np.testing.assert_allclose(
    video[4:] - video[:4], np.tile(between, (4, 1)), atol=1e-6
  )


class Shuffled(DiT):
  """A DiT whose positions are in another order."""

  def _positions(self, grid):
    return super()._positions(grid)[ORDER]


def test_permuting_tokens_and_positions_permutes_outputs():
  model, patch = DiT(**SMALL), (1, 2, 2)
  params = lively(model)

  def shuffle(x):
    cut = tokens.patchify(x[:, None], patch)[:, ORDER]
    return tokens.unpatchify(cut, (1, 4, 4), patch)[:, 0]

  got = run(Shuffled(**SMALL), params, shuffle(X), T, Y)
  want = shuffle(run(model, params, X, T, Y))
  np.testing.assert_allclose(got, want, atol=1e-4)
  assert np.abs(got - run(model, params, shuffle(X), T, Y)).max() > 1e-2


def test_dropped_labels_are_the_null_label():
  model = DiT(**SMALL)
  params = lively(model)
  drop = np.array([False, True])
  got = run(model, params, X, T, Y, drop=drop)
  want = run(model, params, X, T, np.array([1, 5]))
  np.testing.assert_allclose(got, want, atol=1e-6)
  kept = run(model, params, X, T, Y)
  np.testing.assert_allclose(got[0], kept[0], atol=1e-6)
  assert np.abs(got[1] - kept[1]).max() > 1e-3
  null = run(model, params, X, T, np.array([5, 5]))
  np.testing.assert_allclose(run(model, params, X, T), null, atol=1e-6)
  assert np.isnan(run(model, params, X, T, np.array([1, 6]))[1]).any()


# The stack of blocks is tested for it, and the hooks below for the scan.
@pytest.mark.slow
def test_scan_and_remat_change_nothing():
  plain = DiT(**{**VIDEO, 'depth': 2}, attention='factorised')
  params = lively(plain, V)
  stacked = transformer.stack_blocks(params)
  same = jax.tree.map(jnp.shape, shapes(plain.clone(scan=True), V))
  assert jax.tree.map(jnp.shape, stacked) == same

  def value(model, params):
    def loss(p):
      out = model.apply({'params': p}, V, T, Y)
      return jnp.sin(out).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return out, transformer.unstack_blocks(grads)

  want = value(plain, params)
  got = value(plain.clone(scan=True, remat='full'), stacked)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
    got,
    want,
  )


@pytest.mark.parametrize('attention', ['joint', 'factorised'])
def test_video(attention):
  model = DiT(**VIDEO, attention=attention)
  params = lively(model, V)
  want = run(model, params, V, T, Y)
  assert want.shape == (2, 4, 8, 8, 8)
  # A time for each slice, all equal, is one time.
  same = np.tile(T[:, None], (1, 2))
  got = run(model, params, V, same, Y)
  np.testing.assert_allclose(got, want, atol=1e-4)
  same[0, 1] = 50.0
  got = run(model, params, V, same, Y)
  np.testing.assert_allclose(got[1], want[1], atol=1e-4)
  assert np.abs(got[0] - want[0]).max() > 1e-2
  # Slices see each other.
  other = V.copy()
  other[:, 2:] = RNG.normal(size=other[:, 2:].shape)
  moved = run(model, params, other, T, Y)
  assert np.abs(moved[:, :2] - want[:, :2]).max() > 1e-3


def test_factorised_attention_extends_an_image_model():
  model = DiT(**VIDEO, attention='factorised')
  params = lively(model, V)
  block = params['blocks_0']
  block['ada_time'] = jax.tree.map(np.zeros_like, block['ada_time'])
  got = run(model, params, V, T, Y)
  del block['ada_time'], block['attn_time']
  want = run(DiT(**VIDEO), params, V[:, :2], T, Y)
  np.testing.assert_allclose(got[:, :2], want, atol=1e-4)


def test_factorised_attention_over_time_stays_at_its_place():
  model = DiT(**VIDEO, attention='factorised')
  params = lively(model, V)
  attn = params['blocks_0']['attn']
  params['blocks_0']['attn'] = jax.tree.map(np.zeros_like, attn)
  other = V.copy()
  other[:, 0, :4, :4] = 0.0
  change = run(model, params, V, T, Y) - run(model, params, other, T, Y)
  # By slice, row and column of tokens.
  change = np.abs(change).reshape(2, 2, 2, 2, 4, 2, 4, 8).max((0, 2, 4, 6, 7))
  assert (change > 1e-4).tolist() == [[[True, False], [False, False]]] * 2


def keep_first(layer, x, context, *, kept):
  del layer, context
  return jnp.arange(x.shape[-1]) < kept


def shift(layer, x, context):
  size = layer + context.tau[:, None, None] / 1000
  return x + size * jnp.arange(x.shape[-1])


class Soft(nn.Module):
  """A mask with parameters of each layer, and a value to keep."""

  @nn.compact
  def __call__(self, layer, x, context):
    gate = nn.Dense(1, name='gate')(context.shared['time'])
    self.sow('aux', 'mean', 0 * gate.mean() + layer)
    return 1 + gate[:, None]


class Shared(nn.Module):
  """What the blocks share."""

  @nn.compact
  def __call__(self, context, embed_time):
    table = embed_time(jnp.arange(10.0))
    return {'time': nn.Dense(3, name='gate')(table[context.tau])}


@pytest.mark.parametrize('scan', [False, True])
def test_hooks_with_parameters_and_values(scan):
  hooks = adaln.Hooks(mask=Soft(), prepare=Shared())
  model = DiT(**{**SMALL, 'depth': 2}, scan=scan, hooks=hooks)
  tau = np.array([1, 9])
  params = lively(model, tau=tau)
  assert params['prepare_hook']['gate']['kernel'].shape == (16, 3)
  blocks = transformer.unstack_blocks(params)
  for i in range(2):
    assert blocks[f'blocks_{i}']['mask_hook']['gate']['kernel'].shape == (3, 1)
  apply = jax.jit(functools.partial(model.apply, mutable='aux'))
  out, aux = apply({'params': params}, X, T, Y, tau=tau)
  values = np.concatenate([np.ravel(v) for v in jax.tree.leaves(aux)])
  assert values.tolist() == [0.0, 1.0]  # one of each layer
  np.testing.assert_allclose(
    run(model, params, X, T, Y, tau=tau), out, atol=1e-5
  )
  assert not np.allclose(run(model, params, X, T, Y, tau=tau[::-1]), out)


def test_token_hook_knows_its_layer_and_prefix_adds_tokens():
  plain = DiT(**{**SMALL, 'depth': 2}, scan=True)
  params = lively(plain)
  want = run(plain, params, X, T, Y)
  hooked = plain.clone(hooks=adaln.Hooks(token=shift))
  got = run(hooked, params, X, T, Y, tau=np.array([0, 500]))
  unrolled = run(
    hooked.clone(scan=False),
    transformer.unstack_blocks(params),
    *(X, T, Y),
    tau=np.array([0, 500]),
  )
  np.testing.assert_allclose(got, unrolled, atol=1e-4)
  assert np.abs(got - want).max((1, 2, 3)).min() > 1e-2
  longer = run(plain.clone(hooks=adaln.Hooks(prefix=3)), params, X, T, Y)
  assert longer.shape == want.shape
  assert np.abs(longer - want).max() > 1e-3


def test_bfloat16_computes_in_it_and_keeps_float32_parameters():
  model = DiT(**SMALL, dtype='bfloat16')
  params = lively(model)
  want = run(model.clone(dtype='float32'), params, X, T, Y)
  got = run(model, params, X, T, Y)
  assert got.dtype == np.float32
  assert 1e-4 < np.abs(got - want).max() < 0.05 * np.abs(want).max()
  dtypes = {x.dtype for x in jax.tree.leaves(shapes(model))}
  assert dtypes == {jnp.dtype('float32')}


def test_a_recipe_can_name_it():
  mask = config.bind(keep_first, kept=3)
  cfg = config.ref(DiT, **SMALL, hooks=config.ref(adaln.Hooks, mask=mask))
  assert 'hooks.mask.kept = 3' in config.to_text(cfg)
  assert config.build(cfg).hooks.mask.keywords == {'kept': 3}
  assert config.build(config.ref(DiT)).out_channels == 8


@pytest.mark.parametrize(
  ('fields', 'args', 'message'),
  [
    (dict(size='H'), (X, T), "`denoiser.size`.*'H'"),
    (dict(patch=3), (X, T), 'rows.*multiple of 3, found 8.*denoiser.patch'),
    (dict(channels=3), (X, T), r'\[B, H, W, 3\].*denoiser.channels'),
    (dict(), (X[0], T), r'found shape \(8, 8, 4\)'),
    (dict(), (X, jnp.ones((2, 3))), r'times \[B\] or \[B, 1\]'),
    (dict(), (V, T), 'denoiser.frames'),
    (dict(label_dropout=0.0), (X, T), 'label_dropout'),
    (dict(num_classes=0), (X, T, Y), 'num_classes'),
    (
      dict(attention='factorised', hooks=adaln.Hooks(prefix=1)),
      (X, T),
      "needs `denoiser.attention` 'joint'",
    ),
  ],
)
def test_errors(fields, args, message):
  model = DiT(**{**SMALL, **fields})
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(model.init, jax.random.key(0), *args)
