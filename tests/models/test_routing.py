import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax import config
from vfm_jax.models.dit import DiT
from vfm_jax.models.routing import RandomRouting, Routing
from vfm_jax.nn import adaln, transformer

WIDTH, DEPTH = 16, 2
RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 8, 8, 4)).astype(np.float32)
TAU = np.array([0, 600, 999])
SMALL = dict(
  width=WIDTH, depth=DEPTH, heads=2, patch=4, input_size=8, num_classes=5
)


def dit(mask=None, **fields):
  return DiT(**SMALL, hooks=adaln.Hooks(mask=mask), **fields)


def lively(tree):
  rng = np.random.default_rng(7)
  draw = lambda s: 0.2 * rng.normal(size=s.shape).astype(np.float32)  # noqa: E731
  return jax.tree.map(draw, tree)


def init(model):
  make = lambda: model.init(jax.random.key(0), X, TAU * 1.0, tau=TAU)  # noqa: E731
  return jax.eval_shape(make)['params']


PARAMS = lively(init(dit()))


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, tau):
  return model.apply({'params': params}, X, TAU * 1.0, tau=tau)


def test_there_are_no_parameters():
  assert jax.tree.structure(init(dit(Routing()))) == jax.tree.structure(PARAMS)


def ones(layer, x, context):
  del layer
  return jnp.ones((len(context.tau), 1, x.shape[-1]), x.dtype)


def test_a_full_mask_is_no_mask_bit_for_bit():
  with jax.disable_jit():  # a compiler may fuse the two in different ways
    want = run(dit(), PARAMS, TAU)
    for mask in (Routing(beta=1.0), ones):
      np.testing.assert_array_equal(run(dit(mask), PARAMS, TAU), want)


def test_scanned_and_unrolled_agree():
  mask = RandomRouting(seed=3)  # other masks in each block
  want = run(dit(mask), PARAMS, TAU)
  stacked = transformer.stack_blocks(PARAMS)
  got = run(dit(mask, scan=True), stacked, TAU)
  np.testing.assert_allclose(got, want, atol=1e-4)
  assert np.abs(run(dit(), PARAMS, TAU) - want).max() > 1e-2
  # Other levels take other masks, and the same program.
  programs = run._cache_size()
  moved = run(dit(mask), PARAMS, TAU[::-1].copy())
  assert np.abs(moved - want).max((1, 2, 3))[[0, 2]].min() > 1e-3
  assert run._cache_size() == programs


@pytest.fixture(scope='module')
def block():
  """Return x -> a lively block's output, for one mask of the first channels."""
  layer = adaln.AdaLNBlock(2, 32, hooks=adaln.Hooks(mask=Routing(beta=0.5)))
  tau = jnp.zeros(1, jnp.int32)
  context = adaln.Context(c=jnp.ones((1, 1, WIDTH)), tau=tau)
  x = RNG.normal(size=(1, 4, WIDTH)).astype(np.float32)
  params = jax.eval_shape(layer.init, jax.random.key(0), x, context)['params']

  @jax.jit
  def apply(params, x):
    return layer.apply({'params': params}, x, context)

  return apply, lively(params), x


def test_a_new_block_is_the_identity_under_any_mask(block):
  apply, params, x = block
  zero = {**params, 'ada': jax.tree.map(np.zeros_like, params['ada'])}
  np.testing.assert_array_equal(apply(zero, x), x)


def test_inactive_channels_are_carried_and_written_but_not_read(block):
  apply, params, x = block
  inactive = slice(WIDTH // 2, None)
  update = apply(params, x) - x
  assert np.abs(update[..., inactive]).max() > 1e-2
  other = x.copy()
  other[..., inactive] += RNG.normal(size=(1, 4, WIDTH // 2))
  np.testing.assert_allclose(apply(params, other) - other, update, atol=1e-5)
  other = x.copy()
  other[..., 0] += 1.0
  assert np.abs(apply(params, other) - other - update).max() > 1e-2


def test_random_masks_are_those_of_the_table():
  mask = RandomRouting(beta=0.7, seed=1)
  tables = [mask.table(WIDTH, i) for i in range(DEPTH)]
  assert (tables[0] != tables[1]).any()
  context = adaln.Context(c=jnp.zeros((3, 1, WIDTH)), tau=jnp.asarray(TAU))
  got = jax.jit(mask)(1, jnp.zeros((3, 4, WIDTH), jnp.bfloat16), context)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got[:, 0] > 0, tables[1][TAU])
  window = Routing(beta=0.7)
  got = jax.jit(window)(1, jnp.zeros((3, 4, WIDTH)), context)
  np.testing.assert_array_equal(got[:, 0] > 0, window.table(WIDTH, 1)[TAU])


@pytest.mark.parametrize('mask', [Routing(), RandomRouting()])
def test_the_level_must_be_known(mask):
  with pytest.raises(ValueError, match=r'expected tau int32 \[B\], found None'):
    jax.eval_shape(dit(mask).init, jax.random.key(0), X, TAU * 1.0)


def test_a_recipe_can_name_it():
  hooks = config.ref(adaln.Hooks, mask=config.ref(Routing, beta=0.5))
  cfg = config.ref(DiT, **SMALL, hooks=hooks)
  assert 'hooks.mask.alpha = 4.0' in config.to_text(cfg)
  assert config.build(cfg).hooks.mask == Routing(beta=0.5)
