import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax import config, sharding
from vfm_jax.models import switch
from vfm_jax.models.dit import DiT
from vfm_jax.nn import adaln, transformer

WIDTH, DEPTH, E, K = 16, 2, 3, 2
RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 8, 8, 4)).astype(np.float32)
Y = np.array([0, 1, 4])
TAU = np.array([0, 600, 999])
SMALL = dict(
  width=WIDTH, depth=DEPTH, heads=2, patch=4, input_size=8, num_classes=5
)
MODEL = DiT(**SMALL, hooks=switch.switch(E, top_k=K))


def lively(tree):
  rng = np.random.default_rng(7)
  draw = lambda s: 0.3 * rng.normal(size=s.shape).astype(np.float32)  # noqa: E731
  return jax.tree.map(draw, tree)


def init(model):
  args = jax.random.key(0), X, TAU * 1.0, Y
  return jax.eval_shape(lambda: model.init(*args, tau=TAU))['params']


PARAMS = lively(init(MODEL))


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, tau=TAU):
  return model.apply({'params': params}, X, TAU * 1.0, Y, tau=tau)


@functools.partial(jax.jit, static_argnums=0)
def collect(model, params, x=X, y=Y):
  out, sown = model.apply(
    {'params': params}, x, TAU * 1.0, y, tau=TAU, mutable=['aux']
  )
  return out, transformer.stack_sown(sown['aux'])


def edited(fn):
  """Return the parameters with fn applied to those of the experts."""
  at = lambda path, x: fn(x) if 'experts' in str(path) else x  # noqa: E731
  return jax.tree_util.tree_map_with_path(at, PARAMS)


def without_hooks(params):
  return {
    name: {k: v for k, v in value.items() if k != 'mask_hook'}
    for name, value in params.items()
  }


def test_experts_of_zero_are_a_dit_bit_for_bit():
  zero = edited(np.zeros_like)
  with jax.disable_jit():  # a compiler may fuse the two in different ways
    want = run(DiT(**SMALL), without_hooks(PARAMS))
    np.testing.assert_array_equal(run(MODEL, zero), want)
  assert np.abs(run(MODEL, PARAMS) - want).max() > 1e-2


def test_first_values():
  embeds = switch.Embeds(jnp.zeros((3, WIDTH)))
  context = adaln.Context(
    c=jnp.zeros((3, 1, WIDTH)), shared={switch.SHARED: embeds}
  )
  init = jax.jit(functools.partial(switch.Experts(E, K).init, layer=0))
  made = init(jax.random.key(0), x=jnp.zeros((3, 4, WIDTH)), context=context)
  params = made['params']
  assert not any(np.any(v) for v in jax.tree.leaves(params['experts']))
  assert not np.any(params['gate']['bias'])
  bound = np.sqrt(6 / (WIDTH + E))
  assert 0.8 * bound < np.abs(params['gate']['kernel']).max() <= bound


@pytest.mark.parametrize(
  ('size', 'total'),
  [('S', 5.34e6), ('B', 21.3e6), ('L', 75.6e6), ('XL', 111.7e6)],
)
def test_parameter_counts(size, total):
  def count(hooks):
    model = DiT(size=size, hooks=hooks, scan=True)
    x = jnp.zeros((1, 32, 32, 4))
    zero = jnp.zeros(1, jnp.int32)
    make = functools.partial(model.init, jax.random.key(0), x, zero * 1.0)
    shapes = jax.eval_shape(lambda: make(tau=zero))['params']
    return sum(s.size for s in jax.tree.leaves(shapes)), model.dims

  more, dims = count(switch.switch())
  more -= count(adaln.Hooks())[0]
  width = dims.width
  assert more == dims.depth * (3 * width**2 + 6 * width + 3)
  assert more == pytest.approx(total, rel=2e-3)


def test_scanned_and_unrolled_agree_and_collecting_changes_nothing():
  want, sown = collect(MODEL, PARAMS)
  np.testing.assert_allclose(run(MODEL, PARAMS), want, atol=1e-4)
  stacked = transformer.stack_blocks(PARAMS)
  got, others = collect(MODEL.clone(scan=True, remat='full'), stacked)
  np.testing.assert_allclose(got, want, atol=1e-4)
  assert set(sown) == {switch.GATES, switch.LEVELS, switch.TOP}
  for name, value in sown.items():
    np.testing.assert_allclose(others[name], value, atol=1e-5)


def test_gates_know_the_level_alone_and_are_not_normalised_again():
  _, sown = collect(MODEL, PARAMS)
  _, others = collect(MODEL, PARAMS, -X, Y[::-1].copy())
  gates, levels, top = (
    np.asarray(sown[k]) for k in (switch.GATES, switch.LEVELS, switch.TOP)
  )
  np.testing.assert_array_equal(others[switch.GATES], gates)
  assert gates.shape == (DEPTH, 3, E)
  assert levels.shape == (DEPTH, 1000, E)
  assert top.shape == (DEPTH, 1000, K)
  np.testing.assert_allclose(gates, levels[:, TAU], atol=1e-5)
  np.testing.assert_allclose(levels.sum(-1), 1, atol=1e-5)
  used = np.take_along_axis(levels, top, -1)
  np.testing.assert_array_equal(used, -np.sort(-levels, -1)[..., :K])
  assert used.sum(-1).max() < 1


def test_a_sampler_merges_kernels_once_and_training_has_no_branch():
  def text(tau, **kwargs):
    apply = lambda p, tau: MODEL.apply(  # noqa: E731
      {'params': p}, X, TAU * 1.0, Y, tau=tau, **kwargs
    )
    return str(jax.make_jaxpr(apply)(PARAMS, tau))

  keys = jax.random.split(jax.random.key(0), 3)
  assert text(TAU).count('cond[') == DEPTH
  assert 'cond[' not in text(TAU, keys=keys)
  # What an example gives does not depend on the levels of the others.
  alone = run(MODEL, PARAMS, np.full(3, TAU[1]))
  np.testing.assert_allclose(run(MODEL, PARAMS)[1], alone[1], atol=1e-5)


def mask_of(hook, params, x):
  """Return the mask for embeddings [3, D] of their own."""
  batch = RNG.normal(size=(3, WIDTH)).astype(np.float32)
  shared = {switch.SHARED: switch.Embeds(jnp.asarray(batch))}
  context = adaln.Context(c=jnp.zeros((3, 1, WIDTH)), shared=shared)
  gate = params['gate']
  p = jax.nn.softmax(batch @ gate['kernel'] + gate['bias'])
  return hook.apply({'params': params}, 0, x, context), np.asarray(p)


def test_masks_are_one_plus_the_mixture():
  params = PARAMS['blocks_0']['mask_hook']
  x = RNG.normal(size=(3, 4, WIDTH)).astype(np.float32)
  kernel, bias = (params['experts'][k] for k in ('kernel', 'bias'))
  got, p = mask_of(switch.Experts(E, K), params, x)
  used = np.where(p >= np.sort(p)[:, -K, None], p, 0)
  each = np.einsum('bnd,edf->bnef', x, kernel) + bias
  want = 1 + (used[:, None, :, None] * each).sum(2)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  # All of equal experts are one of them, by gates that add up to 1.
  same = jax.tree.map(lambda v: np.stack([v[0]] * E), params['experts'])
  got, _ = mask_of(switch.Experts(E, E), {**params, 'experts': same}, x)
  want = 1 + x @ kernel[0] + bias[0]
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_experts_are_cut_over_their_axis():
  scanned = init(MODEL.clone(scan=True, hooks=switch.switch(4)))
  specs = sharding.infer({'denoiser': scanned}, {'expert': 2, 'fsdp': 2})
  hook = specs['denoiser']['blocks']['mask_hook']
  assert tuple(hook['experts']['kernel'].spec) == (None, 'expert', 'fsdp')
  assert tuple(hook['experts']['bias'].spec) == (None, 'expert')
  assert tuple(hook['gate']['kernel'].spec) == (None, 'fsdp')


def test_the_level_must_be_known():
  with pytest.raises(ValueError, match=r'expected tau int32 \[B\], found None'):
    jax.eval_shape(MODEL.init, jax.random.key(0), X, TAU * 1.0, Y)


@pytest.mark.parametrize('top_k', [0, 4])
def test_a_level_uses_some_of_the_experts(top_k):
  with pytest.raises(ValueError, match=r'denoiser\.hooks\.top_k'):
    switch.switch(3, top_k=top_k)


def test_a_recipe_can_name_it():
  hooks = config.ref(switch.switch, top_k=1)
  cfg = config.ref(DiT, **SMALL, hooks=hooks)
  assert 'hooks.experts = 3' in config.to_text(cfg)
  assert config.build(cfg).hooks.mask == switch.Experts(3, 1)
