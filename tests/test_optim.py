"""Check the optimizer: groups, decay, layer decay, freezing, methods."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vfm_jax import optim, schedules, trees
from vfm_jax.optim import Group, Optimizer

CONSTANT = functools.partial(schedules.constant, value=0.1)


def make_params(scan=False, depth=3):
  """Return the names and shapes of a small VideoMAE-like tree."""
  block = {
    'norm1': {'scale': (4,), 'bias': (4,)},
    'attn': {'qkv': {'kernel': (4, 3, 2, 2)}, 'q_bias': (4,)},
    'mlp': {'fc1': {'kernel': (4, 8), 'bias': (8,)}},
  }
  is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
  if scan:
    lead = jax.tree.map(lambda s: (depth, *s), block, is_leaf=is_shape)
    stack = {'blocks': lead}
  else:
    stack = {f'blocks_{k}': block for k in range(depth)}
  shapes = {
    'encoder': {
      'patch_embed': {'kernel': (6, 4), 'bias': (4,)},
      'pos_embed': (5, 4),
      'mask_token': (1, 4),
      'norm': {'scale': (4,), 'bias': (4,)},
      **stack,
    },
    'head': {'kernel': (4, 2), 'bias': (2,)},
  }
  leaves, treedef = jax.tree.flatten(shapes, is_leaf=is_shape)
  rng = np.random.default_rng(0)
  return jax.tree.unflatten(
    treedef, [jnp.asarray(rng.normal(size=s), jnp.float32) for s in leaves]
  )


def rows_of(optimizer, params, steps=10):
  return {r.path: r for r in optimizer.build(params, steps)[1]}


def run(optimizer, params, steps=3):
  tx, _ = optimizer.build(params, steps)
  state = tx.init(params)

  @jax.jit
  def step(params, state):
    grads = jax.tree.map(lambda p: 0.3 * p + 0.1, params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  for _ in range(steps):
    params, state = step(params, state)
  return params, state


def assert_trees_close(a, b, **kw):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **kw), a, b)


def test_plain_adamw_is_optax_adamw_with_the_mask():
  params = make_params()
  got, _ = run(Optimizer(CONSTANT, weight_decay=0.05), params)
  mask = trees.map_with_path(
    lambda path, x: optim.decay_matrices(path, x.ndim), params
  )
  tx = optax.adamw(0.1, 0.9, 0.95, weight_decay=0.05, mask=mask)
  state, expected = tx.init(params), params
  for _ in range(3):
    grads = jax.tree.map(lambda p: 0.3 * p + 0.1, expected)
    updates, state = tx.update(grads, state, expected)
    expected = optax.apply_updates(expected, updates)
  assert_trees_close(got, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('scan', [False, True])
def test_what_decays(scan):
  rows = rows_of(Optimizer(CONSTANT, weight_decay=0.05), make_params(scan))
  decayed = {p.split('/', 1)[-1] for p, r in rows.items() if r.weight_decay}
  names = ['blocks'] if scan else [f'blocks_{k}' for k in range(3)]
  expected = {'patch_embed/kernel', 'kernel'}
  for name in names:
    expected |= {f'{name}/attn/qkv/kernel', f'{name}/mlp/fc1/kernel'}
  assert decayed == expected


def test_layer_decay_scales():
  rows = rows_of(Optimizer(CONSTANT, layer_decay=0.75), make_params())
  scale = {path: row.lr_scale for path, row in rows.items()}
  assert scale['encoder/patch_embed/kernel'] == 0.75**4
  assert scale['encoder/pos_embed'] == 0.75**4
  assert scale['encoder/mask_token'] == 0.75**4
  assert scale['encoder/blocks_0/attn/q_bias'] == 0.75**3
  assert scale['encoder/blocks_2/attn/q_bias'] == 0.75
  assert scale['encoder/norm/scale'] == scale['head/kernel'] == 1.0


def test_scanned_stack_moves_as_the_unrolled_one():
  optimizer = Optimizer(
    CONSTANT, layer_decay=0.5, groups=(Group('q_bias', lr_scale=2.0),)
  )
  flat = make_params()
  encoder = dict(flat['encoder'])
  blocks = [encoder.pop(f'blocks_{k}') for k in range(3)]
  encoder['blocks'] = jax.tree.map(lambda *x: jnp.stack(x), *blocks)
  scanned = {'encoder': encoder, 'head': flat['head']}
  got, _ = run(optimizer, scanned)
  expected, _ = run(optimizer, flat)
  for k in range(3):
    layer = jax.tree.map(lambda x, k=k: x[k], got['encoder']['blocks'])
    assert_trees_close(layer, expected['encoder'][f'blocks_{k}'], rtol=1e-6)


def test_layer_decay_needs_one_stack():
  two = {'a': make_params()['encoder'], 'b': make_params()['encoder']}
  optimizer = Optimizer(CONSTANT, layer_decay=0.5)
  with pytest.raises(ValueError, match=r"found stacks in \['a', 'b'\]"):
    optimizer.build(two, 10)
  named = Optimizer(CONSTANT, layer_decay=0.5, layer_decay_stack='a')
  rows = rows_of(named, two)
  assert rows['a/blocks_2/attn/q_bias'].lr_scale == 0.5
  assert rows['b/blocks_2/attn/q_bias'].lr_scale == 1.0


def test_groups_first_match_wins():
  groups = (
    Group('head/bias', lr_scale=3.0, weight_decay=0.2),
    Group('head', lr_scale=5.0),
  )
  rows = rows_of(Optimizer(CONSTANT, groups=groups), make_params())
  assert rows['head/bias'].lr_scale == 3.0
  assert rows['head/bias'].weight_decay == 0.2
  assert rows['head/kernel'].lr_scale == 5.0
  assert rows['head/kernel'].weight_decay == 0.05
  assert rows['head/kernel'].group == 'head'


def test_a_group_without_parameters_is_an_error():
  groups = (Group('head'), Group('haed'))
  with pytest.raises(ValueError, match=r"'haed'(.|\n)*encoder/pos_embed"):
    Optimizer(CONSTANT, groups=groups).build(make_params(), 10)


def test_frozen_parameters_never_move_and_have_no_moments():
  params = make_params()
  optimizer = Optimizer(
    CONSTANT, groups=(Group('^encoder', freeze=True),), clip_norm=1.0
  )
  got, state = run(optimizer, params)
  jax.tree.map(np.testing.assert_array_equal, got['encoder'], params['encoder'])
  assert not np.array_equal(got['head']['kernel'], params['head']['kernel'])
  paths = [path for path, _ in trees.path_leaves(state)]
  assert any('mu/head/kernel' in p for p in paths)
  assert not any('encoder' in p for p in paths)


def test_clipping_uses_the_norm_of_what_is_trained():
  params = {'a': jnp.ones((3, 3)), 'b': jnp.ones((2, 2))}
  optimizer = Optimizer(
    CONSTANT,
    weight_decay=0.0,
    method=functools.partial(optim.sgd, momentum=0.0),
    clip_norm=1.0,
    groups=(Group('b', freeze=True),),
  )
  tx, _ = optimizer.build(params, 10)
  grads = {'a': jnp.full((3, 3), 2.0), 'b': jnp.full((2, 2), 1e6)}
  updates, _ = tx.update(grads, tx.init(params), params)
  np.testing.assert_allclose(updates['a'], -0.1 / 3.0, rtol=1e-6)
  np.testing.assert_array_equal(updates['b'], 0.0)


def test_weight_decay_schedule():
  decay = functools.partial(schedules.linear, peak=0.4, final=0.0)
  optimizer = Optimizer(
    CONSTANT,
    weight_decay=decay,
    method=functools.partial(optim.sgd, momentum=0.0),
    groups=(Group('own', weight_decay=0.5),),
  )
  params = {'w': jnp.ones((2, 2)), 'own': jnp.ones((2, 2))}
  tx, rows = optimizer.build(params, 4)
  assert {r.path: r.scheduled for r in rows} == {'own': False, 'w': True}
  state, zero = tx.init(params), jax.tree.map(jnp.zeros_like, params)
  for expected in (0.4, 0.3, 0.2):
    updates, state = jax.jit(tx.update)(zero, state, params)
    np.testing.assert_allclose(updates['w'], -0.1 * expected, rtol=1e-6)
    np.testing.assert_allclose(updates['own'], -0.05, rtol=1e-6)


def test_first_moment_in_bfloat16():
  method = functools.partial(optim.adam, mu_dtype='bfloat16')
  tx, _ = Optimizer(CONSTANT, method=method).build(make_params(), 10)
  state = jax.eval_shape(tx.init, make_params())
  types = {
    p.split('/')[-3]: str(x.dtype)
    for p, x in trees.path_leaves(state)
    if p.endswith('head/kernel')
  }
  assert types == {'mu': 'bfloat16', 'nu': 'float32'}


def test_lars_is_optax_lars_under_a_constant_rate():
  params = {'w': jnp.full((3, 2), 2.0), 'bias': jnp.ones(2)}
  got, _ = run(Optimizer(CONSTANT, 0.01, optim.lars), params)
  mask = {'w': True, 'bias': False}
  tx = optax.lars(
    0.1, 0.01, weight_decay_mask=mask, trust_ratio_mask=mask, momentum=0.9
  )
  state, expected = tx.init(params), params
  for _ in range(3):
    grads = jax.tree.map(lambda p: 0.3 * p + 0.1, expected)
    updates, state = tx.update(grads, state, expected)
    expected = optax.apply_updates(expected, updates)
  assert_trees_close(got, expected, rtol=1e-6)


def test_lars_takes_its_ratio_layer_by_layer():
  layer = jnp.arange(1.0, 5.0).reshape(2, 2)
  scanned = {'blocks': {'w': {'kernel': jnp.stack([layer, 9.0 * layer])}}}
  flat = {
    'blocks_0': {'w': {'kernel': layer}},
    'blocks_1': {'w': {'kernel': 9.0 * layer}},
  }
  optimizer = Optimizer(CONSTANT, 0.01, optim.lars)
  got, _ = run(optimizer, scanned)
  expected, _ = run(optimizer, flat)
  for k in range(2):
    np.testing.assert_allclose(
      got['blocks']['w']['kernel'][k],
      expected[f'blocks_{k}']['w']['kernel'],
      rtol=1e-6,
    )


def test_the_rate_follows_the_schedule():
  lr = functools.partial(schedules.warmup_cosine, peak=1.0, warmup_steps=2)
  optimizer = Optimizer(
    lr, 0.0, method=functools.partial(optim.sgd, momentum=0.0)
  )
  params = {'w': jnp.zeros((2, 2))}
  tx, _ = optimizer.build(params, 8)
  state = tx.init(params)
  for step in range(8):
    updates, state = tx.update({'w': jnp.ones((2, 2))}, state, params)
    np.testing.assert_allclose(
      updates['w'], -optimizer.lr_at(step, 8), rtol=1e-6
    )


def test_build_needs_shapes_only():
  shapes = jax.eval_shape(make_params)
  assert len(Optimizer(CONSTANT).build(shapes, 10)[1]) == len(
    jax.tree.leaves(shapes)
  )


@pytest.mark.parametrize(
  ('setting', 'message'),
  [
    ({'clip_norm': 0.0}, r'config\.optim\.clip_norm=0\.0'),
    ({'layer_decay': 1.5}, r'config\.optim\.layer_decay=1\.5'),
  ],
)
def test_settings_that_make_no_sense(setting, message):
  with pytest.raises(ValueError, match=message):
    Optimizer(CONSTANT, **setting)


def test_parts_are_clipped_apart_and_from_a_step_on():
  params = {
    'encoder': {'kernel': jnp.zeros((2, 2))},
    'head': {'kernel': jnp.zeros((2, 2))},
  }
  optimizer = Optimizer(
    CONSTANT,
    weight_decay=0.0,
    method=functools.partial(optim.sgd, momentum=0.0, nesterov=False),
    clip_norm=1.0,
    clip_apart=('^encoder/',),
    clip_from=1,
  )
  tx, _ = optimizer.build(params, 10)
  grads = {
    'encoder': {'kernel': jnp.full((2, 2), 3.0)},  # of norm 6
    'head': {'kernel': jnp.full((2, 2), 0.25)},  # of norm 0.5
  }
  state = tx.init(params)
  first, state = tx.update(grads, state, params)
  second, _ = tx.update(grads, state, params)
  for update, encoder in ((first, -0.3), (second, -0.05)):
    np.testing.assert_allclose(update['encoder']['kernel'], encoder, rtol=1e-6)
    np.testing.assert_allclose(update['head']['kernel'], -0.025, rtol=1e-6)


def test_parts_to_clip_must_exist():
  with pytest.raises(ValueError, match=r'need config\.optim\.clip_norm'):
    Optimizer(CONSTANT, clip_from=3)
  optimizer = Optimizer(CONSTANT, clip_norm=1.0, clip_apart=('^decoder/',))
  with pytest.raises(ValueError, match=r"'\^decoder/' matches no parameter"):
    optimizer.build(make_params(), 10)


def test_mask_tokens_decay_where_it_is_asked_for():
  path = 'predictor/mask_tokens'
  assert not optim.decay_matrices(path, 2)
  assert optim.decay_tokens(path, 2)
  assert not optim.decay_tokens('predictor/norm/scale', 1)
  assert not optim.decay_tokens('encoder/blocks_0/attn/qkv/bias', 3)
