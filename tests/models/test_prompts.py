import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vfm_jax import config
from vfm_jax.models import prompts
from vfm_jax.models.dit import DiT
from vfm_jax.models.switch import switch
from vfm_jax.nn import adaln, transformer

SMALL = dict(width=16, depth=2, heads=2, input_size=8, num_classes=5, scan=True)
BASE = DiT(**SMALL)
TOKENS = 16
RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 8, 8, 4)).astype(np.float32)
T = np.array([3.0, 400.0, 900.0], np.float32)
TAU = T.astype(np.int32)
Y = np.array([1, 4, 0])
KEYS = jax.random.split(jax.random.key(1), 3)


def patch(model=BASE, count=TOKENS, **kwargs):
  return model.clone(hooks=prompts.dmp(count, **kwargs))


ADD = patch(top=0.25)
PREPEND = patch(count=6, mode='prepend')


def lively(model):
  """Return parameters with nothing at zero."""
  rng = np.random.default_rng(7)
  draw = lambda s: 0.3 * rng.normal(size=s.shape).astype(np.float32)  # noqa: E731
  return jax.tree.map(draw, start(model))


def zeroed(params):
  """Return parameters with prompts of zero."""
  hook = jax.tree.map(np.zeros_like, params['blocks']['token_hook'])
  return {**params, 'blocks': {**params['blocks'], 'token_hook': hook}}


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, t=T, y=Y, keys=None):
  """Return the output and what the blocks sowed."""
  out, seen = model.apply(
    {'params': params}, X, t, y, tau=TAU, keys=keys, mutable=['aux']
  )
  return out, transformer.stack_sown(seen.get('aux', {}))


def start(model, x=X, t=T, y=Y):
  """Return the shapes of the parameters."""
  make = functools.partial(model.init, tau=TAU)
  return jax.eval_shape(make, jax.random.key(0), x, t, y)['params']


def test_parameters():
  params = start(ADD.clone(scan=False))
  for i in range(2):
    hook = params[f'blocks_{i}']['token_hook']
    assert hook['prompt_tokens'].shape == (16, 16)
  # One gate for all blocks.
  gate = params['prepare_hook']
  assert gate['gate']['kernel'].shape == (16, 16)
  assert gate['gate']['bias'].shape == (16,)
  assert gate['depth_scale'].shape == (16,)
  assert gate['noise']['kernel'].shape == (16, 16)
  assert 'prepare_hook' not in start(patch(kind='PT'))


def test_overhead_is_what_the_paper_says():
  """1.43 % of DiT-L/2 (arXiv:2405.17825): prompts of all blocks and a gate."""
  base = DiT(size='L', num_classes=0, scan=True)
  x, t = jnp.zeros((1, 32, 32, 4)), jnp.zeros(1)

  def count(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, t)['params']
    shapes.get('prepare_hook', {}).pop('noise', None)  # which it leaves out
    return sum(math.prod(s.shape) for s in jax.tree.leaves(shapes))

  more = count(patch(base, 256)) - count(base)
  assert more == 24 * 256 * 1024 + 256 * 1025 + 256
  assert more / 457.08e6 == pytest.approx(0.01434, abs=1e-5)


def test_prompts_start_at_zero_and_leave_the_network_bit_for_bit():
  zeros = nn.initializers.zeros
  for hook in (ADD.hooks.token, ADD.hooks.prepare):
    assert prompts._initialiser(hook.start, 1) is zeros
  params = zeroed(lively(ADD))
  want, _ = run(BASE, params)
  assert np.abs(want).max() > 0.1
  for keys in (None, KEYS):
    np.testing.assert_array_equal(run(ADD, params, keys=keys)[0], want)


def test_gates():
  params = lively(ADD)
  out, sown = run(ADD, params)
  gates = np.asarray(sown['prompt_gates'])
  assert gates.shape == (2, 3, TOKENS)
  np.testing.assert_allclose(gates.sum(-1), 1, rtol=1e-6)
  assert ((gates > 0).sum(-1) == 4).all()
  full = patch()
  dense = np.asarray(run(full, params)[1]['prompt_gates'])
  assert (dense > 0).all()
  assert np.abs(dense[1] - dense[0]).max() > 1e-2  # by the layer's number
  # Without its share of the gate, a layer's number says nothing.
  still = {**params, 'prepare_hook': dict(params['prepare_hook'])}
  still['prepare_hook']['depth_scale'] = np.zeros(TOKENS, np.float32)
  same = np.asarray(run(full, still)[1]['prompt_gates'])
  np.testing.assert_allclose(same[0], same[1], atol=1e-7)
  assert np.abs(out - run(BASE, params)[0]).max() > 1e-2


@pytest.mark.slow
def test_added_prompts_see_the_label_and_prepended_ones_do_not():
  other = (Y + 1) % 5
  for model, sees in ((ADD, True), (PREPEND, False)):
    params = lively(model)
    gates, by_label, by_time = (
      run(model, params, **k)[1]['prompt_gates']
      for k in ({}, {'y': other}, {'t': T + 50})
    )
    assert np.any(gates != by_label) == sees
    assert np.any(gates != by_time)


def test_noise_is_for_training_alone():
  params = lively(ADD)
  params['prepare_hook'] = jax.tree.map(jnp.zeros_like, params['prepare_hook'])
  # Softmax over all, so that differences of logits can be read back.
  model = patch()
  keys = jax.random.split(jax.random.key(2), 3)
  many = [run(model, params, keys=k)[1] for k in (KEYS, keys)]
  logits = np.concatenate([np.log(s['prompt_gates']) for s in many])
  centred = logits - logits.mean(-1, keepdims=True)
  std = np.sqrt(np.square(centred).sum() / (centred.size * 15 / 16))
  assert std == pytest.approx(math.log(2) + 0.01, rel=0.15)  # 192 draws
  assert len(np.unique(logits)) == logits.size  # other in each layer
  np.testing.assert_array_equal(run(model, params)[1]['prompt_gates'], 1 / 16)
  std = model.hooks.prepare.apply(
    {'params': params['prepare_hook']},
    adaln.Context(c=jnp.ones((2, 1, 16))),
  )['prompts'].std
  np.testing.assert_allclose(std, 0.703147, rtol=1e-6)


def test_an_examples_noise_is_its_own():
  params = lively(ADD)
  _, both = run(ADD, params, keys=KEYS)
  _, swapped = run(ADD, params, keys=KEYS[::-1])
  for name in ('prompt_gates', 'prompt_load'):
    np.testing.assert_array_equal(both[name][:, 1], swapped[name][:, 1])
    assert np.any(both[name][:, 0] != swapped[name][:, 0])


def test_load_and_who_decides():
  params = lively(ADD)
  _, quiet = run(ADD, params)
  np.testing.assert_array_equal(quiet['prompt_load'], quiet['prompt_gates'] > 0)
  assert not quiet['prompt_drawn'].any()
  _, noisy = run(ADD, params, keys=KEYS)
  assert ((noisy['prompt_load'] > 0) & (noisy['prompt_load'] < 1)).any()
  assert noisy['prompt_drawn'].all()
  assert not run(patch(), params, keys=KEYS)[1]['prompt_drawn'].any()


@pytest.mark.parametrize(
  'model',
  [ADD, patch(count=6, mode='prepend', top=0.5, depth=1)],
  ids=['add', 'prepend-first'],
)
def test_scanned_and_unrolled_agree(model):
  params = lively(model)
  out, sown = run(model, params, keys=KEYS)
  unrolled = transformer.unstack_blocks(params)
  other, also = run(model.clone(scan=False), unrolled, keys=KEYS)
  np.testing.assert_allclose(other, out, atol=1e-5)
  assert sown.keys() == {'prompt_gates', 'prompt_load', 'prompt_drawn'}
  for name, value in sown.items():
    np.testing.assert_allclose(also[name], value, atol=1e-5)
    assert np.any(value[0])
    assert np.any(value[1]) == (model is ADD)
  if model is not ADD:  # The prompts of the second block have no effect.
    changed = jax.tree.map(np.copy, params)
    changed['blocks']['token_hook']['prompt_tokens'][1] = 1.0
    np.testing.assert_array_equal(run(model, changed, keys=KEYS)[0], out)


def test_prepended_prompts_come_and_go():
  params = transformer.unstack_blocks(lively(PREPEND))

  @jax.jit
  def look(params):
    inside = []
    spy = lambda layer, x, context: inside.append(x) or 1.0  # noqa: E731
    model = patch(count=6, mode='prepend', base=adaln.Hooks(mask=spy))
    got, seen = model.clone(scan=False).apply(
      {'params': params}, X, T, Y, mutable=['aux']
    )
    return got, transformer.stack_sown(seen['aux'])['prompt_gates'], inside

  got, gates, inside = look(params)
  assert got.shape == (3, 8, 8, 8)
  for i, x in enumerate(inside):
    assert x.shape == (3, 6 + TOKENS, 16)
    rows = params[f'blocks_{i}']['token_hook']['prompt_tokens']
    np.testing.assert_allclose(x[:, :6], gates[i][..., None] * rows, atol=1e-6)


def test_prompt_tuning_adds_the_prompts_as_they_are():
  model = patch(kind='PT')
  params = lively(model)
  rows = params['blocks']['token_hook']['prompt_tokens']
  add = lambda layer, x, context: x + jnp.asarray(rows)[layer]  # noqa: E731
  by_hand = BASE.clone(hooks=adaln.Hooks(token=add))
  out, sown = run(model, params)
  np.testing.assert_allclose(out, run(by_hand, params)[0], atol=1e-6)
  assert not sown


def test_a_switch_dit_can_be_patched():
  base = BASE.clone(hooks=switch(3, top_k=2))
  model = patch(base=base.hooks)
  params = lively(model)
  np.testing.assert_array_equal(
    run(model, zeroed(params))[0], run(base, params)[0]
  )
  assert 'mask_hook' in params['blocks']
  assert np.any(run(model, params)[0] != run(base, params)[0])


def test_random_start():
  context = adaln.Context(c=jnp.ones((1, 1, 16)), grid=(1, 4, 4))
  hooks = prompts.dmp(TOKENS, init='random', depth=2)
  key, x = jax.random.key(0), jnp.ones((1, TOKENS, 16))
  shared, gate = hooks.prepare.init_with_output(key, context)
  context = context.replace(shared=shared)
  tokens = hooks.token.init(key, 0, x, context)['params']['prompt_tokens']
  gate = gate['params']
  for values, fans in (
    (tokens, (16 + 2) * 16),
    (gate['gate']['kernel'], 16 + 17),
    (gate['noise']['kernel'], 32),
  ):
    limit = math.sqrt(6 / fans)
    assert 0.9 * limit < np.abs(values).max() <= limit
  assert not np.any(gate['gate']['bias'])


@pytest.mark.parametrize(
  ('kwargs', 'text'),
  [
    (dict(count=0), 'hooks.count.*found 0'),
    (dict(top=0.05), 'hooks.top.*found 16 and 0.05'),
    (dict(top=1.5), 'hooks.top.*found 16 and 1.5'),
    (dict(depth=0), 'hooks.depth` of at least 1 or None, found 0'),
    (dict(init='random'), 'hooks.depth`, the number'),
    (dict(base=adaln.Hooks(prefix=2)), 'hooks.base` without a token'),
  ],
)
def test_settings_that_mean_nothing(kwargs, text):
  with pytest.raises(ValueError, match=text):
    patch(**kwargs)


def test_numbers_that_do_not_fit():
  with pytest.raises(ValueError, match=r'hooks.count` 16, .* found 4'):
    start(patch(count=4))
  wrong = adaln.Hooks(
    token=PREPEND.hooks.token, prepare=PREPEND.hooks.prepare, prefix=2
  )
  with pytest.raises(ValueError, match=r'hooks.prefix` 6, .* found 2'):
    start(BASE.clone(hooks=wrong))
  with pytest.raises(ValueError, match="attention` 'joint'"):
    start(PREPEND.clone(attention='factorised'))
  video = patch(BASE.clone(frames=2), 2 * TOKENS)
  x = jnp.zeros((3, 2, 8, 8, 4))
  start(video, x)
  with pytest.raises(ValueError, match=r'one time an example.*\[B, 2\]'):
    start(video, x, jnp.zeros((3, 2)))
  alone = adaln.Hooks(token=ADD.hooks.token)
  with pytest.raises(
    ValueError, match=r"'prompts', .*hooks\.prepare.*found \[\]"
  ):
    start(BASE.clone(hooks=alone))
  unready = adaln.Hooks(mask=switch().mask)
  with pytest.raises(ValueError, match=r"'switch', .*found \['prompts'\]"):
    start(patch(base=unready))


def test_a_recipe_can_name_it():
  node = config.ref(DiT, **SMALL, hooks=config.ref(prompts.dmp, count=TOKENS))
  node.hooks.top = 0.25
  assert config.build(node) == ADD
