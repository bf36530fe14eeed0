import functools

import jax
import numpy as np
import pytest

from vfm_jax import schedules, sharding, trees
from vfm_jax.models.encoders import VideoViT
from vfm_jax.objectives.base import Checks, Embeds, Objective
from vfm_jax.objectives.classify import Classify
from vfm_jax.objectives.low_rank import LowRank
from vfm_jax.optim import Group, Optimizer
from vfm_jax.step import init_state, make_train_step


def make(scan=False, **kwargs):
  encoder = VideoViT(
    width=16,
    depth=2,
    heads=2,
    patch=8,
    frames=2,
    image_size=16,
    pooling='mean',
    norm='pooled',
    num_classes=3,
    head_scale=1.0,
    scan=scan,
  )
  return LowRank(Classify(encoder, 'action', mix=None), **kwargs)


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(0)
  return {
    'video': rng.integers(0, 256, (4, 2, 16, 16, 3), np.uint8),
    'labels': {'action': np.array([0, 2, 1, 2], np.int32)},
    'row': np.arange(4, dtype=np.int32),
  }


@pytest.fixture(scope='module')
def trained(batch):
  """Return (objective, first state, state after five steps)."""
  objective = make(rank=4)
  groups = (
    Group('^lora/'),
    Group('head/'),
    Group('.', freeze=True),
  )
  lr = functools.partial(schedules.constant, value=1e-2)
  optim = Optimizer(lr, groups=groups)
  params = jax.eval_shape(objective.init, jax.random.key(0), batch)[0]
  tx, rows = optim.build(params, 5)
  frozen = {r.path for r in rows if r.frozen}
  first = jax.jit(lambda: init_state(objective, tx, 0, batch))()
  step = jax.jit(make_train_step(objective, tx, frozen=frozen))
  state = first
  for _ in range(5):
    state, metrics = step(state, batch)
  assert not metrics['skipped']
  return objective, first, state


def test_it_satisfies_the_protocols():
  for protocol in (Objective, Embeds, Checks):
    assert isinstance(make(), protocol)


def test_at_first_it_is_the_network_itself_bit_for_bit(trained):
  objective, first, _ = trained
  base = {'encoder': first.params['encoder']}
  merged = jax.jit(objective.merge)(first.params)
  jax.tree.map(np.testing.assert_array_equal, merged, base)


def test_only_the_updates_and_the_head_move(trained):
  _, first, last = trained
  before, after = (dict(trees.path_leaves(s.params)) for s in (first, last))
  for path, value in before.items():
    moved = path.startswith('lora/') or '/head/' in path
    assert np.array_equal(value, after[path]) != moved, path


def test_merged_weights_give_what_the_pairs_give(trained, batch):
  """One block by hand: x W + (alpha / rank) (x A) B."""
  objective, _, last = trained
  merged = jax.device_get(jax.jit(objective.merge)(last.params))
  assert 'lora' not in merged
  np.testing.assert_allclose(
    jax.jit(objective.logits)(last.params, batch),
    jax.jit(objective.objective.logits)(merged, batch),
    atol=1e-5,
  )
  rng = np.random.default_rng(0)
  for path in ('attn/proj', 'attn/qkv', 'mlp/fc1', 'mlp/fc2'):
    old, new, pair = (
      dict(trees.path_leaves(t))
      for t in (last.params['encoder'], merged['encoder'], last.params['lora'])
    )
    path = f'blocks_1/{path}/kernel'
    x = rng.normal(size=(5, old[path].shape[0]))
    a, b = (pair[f'encoder/{path}/{n}'] for n in 'ab')
    assert a.shape[1] == b.shape[0] == 4
    by_hand = x @ old[path].reshape(len(x[0]), -1) + 16 / 4 * (x @ a) @ b
    by_merge = x @ new[path].reshape(len(x[0]), -1)
    np.testing.assert_allclose(by_merge, by_hand, atol=1e-5)
    assert np.abs(new[path] - old[path]).max() > 1e-4


def test_scanned_stacks_have_a_pair_a_layer(batch):
  objective = make(scan=True)
  shapes = jax.eval_shape(objective.init, jax.random.key(0), batch)[0]
  leaves = dict(trees.path_leaves(shapes['lora']))
  path = 'encoder/blocks/attn/qkv/kernel'
  assert leaves[f'{path}/a'].shape == (2, 16, 8)
  assert leaves[f'{path}/b'].shape == (2, 8, 48)
  params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
  merged = objective.merge(params)['encoder']['blocks']['attn']['qkv']
  was = params['encoder']['blocks']['attn']['qkv']['kernel']
  np.testing.assert_allclose(merged['kernel'], was + 2 * 8, atol=1e-5)
  # The rules of every run place them.
  sharding.infer(shapes, {'data': 1, 'fsdp': 2, 'tensor': 2})


def test_a_pattern_must_find_matrices(batch):
  def init(**kwargs):
    return jax.eval_shape(make(**kwargs).init, jax.random.key(0), batch)

  with pytest.raises(ValueError, match="'nothing' finds no parameter"):
    init(pattern='nothing')
  with pytest.raises(ValueError, match=r'proj/bias of shape \(16,\)'):
    init(pattern='proj/bias')
  with pytest.raises(ValueError, match='rank must be 1 or more, found 0'):
    make(rank=0)
