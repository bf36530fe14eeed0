"""Patch a trained network with prompts: what is frozen stays as it was."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from vfm_jax import config, convert_dit, flops, sharding, trees, verbs
from vfm_jax.config import ref
from vfm_jax.experiment import WarmStart
from vfm_jax.models import prompts
from vfm_jax.objectives.balance import Balance
from vfm_jax.optim import Group

pytestmark = pytest.mark.slow

RECIPE = pathlib.Path(__file__).parent / 'recipes' / 'tiny_denoise.py'
GROUPS = (
  ref(Group, pattern='token_hook/prompt_tokens'),
  ref(Group, pattern='prepare_hook/', lr_scale=10.0),
  ref(Group, pattern='.', freeze=True),
)


def recipe():
  c = config.load(str(RECIPE))
  c.unlock()
  c.objective.denoiser.update(width=16, scan=True)
  c.optim.weight_decay = 0.0
  return c


def patched(workdir, item='params', frames=4, denoiser=None, **kwargs):
  c = recipe()
  c.objective.denoiser.update(denoiser or {})
  c.data.train.clip.frames = frames
  # 2 x 2 tokens a slice.
  count = frames // c.objective.denoiser.tubelet * 4
  c.objective.denoiser.hooks = ref(prompts.dmp, count=count, top=0.5)
  c.objective.auxiliary = ref(Balance)
  c.optim.groups = GROUPS
  c.update(ema=(), eval_ema=None, **kwargs)
  c.warm_start = ref(
    WarmStart,
    workdir=str(workdir),
    item=item,
    fresh=('denoiser/blocks/token_hook/.*', 'denoiser/prepare_hook/.*'),
  )
  return config.build(c)


def train(exp, state, steps):
  """Return the states after the first step and after the last one."""
  states, step = [], jax.jit(exp.train_step())
  with exp.data.train.train_batches(exp.batch_size, seed=0) as batches:
    for _ in range(steps):
      state, metrics = step(state, jax.tree.map(np.asarray, next(batches)))
      assert np.isfinite(metrics['loss'])
      states.append(state)
  return states[0], states[-1]


def started(exp):
  mesh = sharding.make_mesh(
    dataclasses.replace(exp.mesh, data=1), jax.devices()[:1]
  )
  return exp.first_state(exp.shardings(mesh))


def is_base(path):
  return 'token_hook' not in path and 'prepare_hook' not in path


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """Return a network that has learned something, and its work directory."""
  exp = config.build(recipe())
  _, state = train(exp, started(exp), 3)
  workdir = tmp_path_factory.mktemp('base')
  with exp.checkpointer(str(workdir)) as saved:
    saved.save(3, state, force=True)
  return exp, state, workdir


@pytest.fixture(scope='module')
def tuned(base):
  """Return the patched run, and its states at 0, 1 and 20 steps."""
  exp = patched(base[2])
  first = started(exp)
  kept = jax.tree.map(np.array, first)
  return exp, kept, *train(exp, first, 20)


def test_the_patch_starts_as_the_network_bit_for_bit(base, tuned):
  plain, state, _ = base
  exp, start, *_ = tuned
  with exp.data.train.train_batches(8, seed=1) as batches:
    batch = jax.tree.map(np.asarray, next(batches))
  # It has learned something: the last layer of a DiT is zero at first.
  final = state.params['denoiser']['final']['linear']['kernel']
  assert np.abs(final).max() > 1e-3
  for training in (False, True):
    a, b = (
      jax.jit(functools.partial(e.objective.loss, train=training))(
        p, {}, batch, jax.random.key(3)
      )
      for e, p in ((plain, state.params), (exp, start.params))
    )
    np.testing.assert_array_equal(a.sums, b.sums)
    np.testing.assert_array_equal(a.metrics['mse'], b.metrics['mse'])
    # Noise decides what has a weight in training.
    assert b.metrics['load'] > 0 or not training


def test_nothing_of_the_base_moves_or_has_state(tuned):
  _, start, _, last = tuned
  after = dict(trees.path_leaves(last.params))
  for path, before in trees.path_leaves(start.params):
    same = np.asarray(before).tobytes() == np.asarray(after[path]).tobytes()
    assert same == is_base(path), path
  own = [p for p, _ in trees.path_leaves(start.params) if not is_base(p)]
  moments = [
    p for p, x in trees.path_leaves(last.opt_state) if getattr(x, 'ndim', 0)
  ]
  assert len(moments) == 2 * len(own)
  assert all(any(m.endswith(p) for p in own) for m in moments)


def test_the_gate_learns_ten_times_as_fast(tuned):
  exp, _, first, _ = tuned
  rows = {row.path: row for row in exp.optimizer[1]}
  for path, row in rows.items():
    assert row.frozen == is_base(path)
    if not row.frozen:
      assert row.lr_scale == (10.0 if 'prepare_hook' in path else 1.0)
  # The first step of Adam is the learning rate.
  blocks = first.params['denoiser']['blocks']
  tokens = blocks['token_hook']['prompt_tokens']
  assert np.abs(tokens).max() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize('accum', [2, pytest.param(1, marks=pytest.mark.slow)])
def test_frozen_parameters_cost_no_gradient(base, accum):
  plain, _, workdir = base
  exp = patched(workdir, accum=accum)
  full = dataclasses.replace(plain, accum=accum)
  counts = [
    flops.count(e.train_step(), e.abstract_state, e.batch_spec)
    for e in (full, exp)
  ]
  # Forward and backward by the activations are two of three products.
  assert 0.6 < counts[1] / counts[0] < 0.75


def test_a_released_file_can_be_patched(tmp_path):
  """From a file to prompts on its network, which stays what it is."""
  image = dict(tubelet=1, frames=1)
  c = recipe()
  c.objective.denoiser.update(**image)
  c.data.train.clip.frames = 1
  plain = config.build(c)
  rng = np.random.default_rng(0)
  draw = lambda s: 0.1 * rng.normal(size=s.shape).astype(np.float32)  # noqa: E731
  values = jax.tree.map(draw, plain.abstract_state.params['denoiser'])
  file = convert_dit.to_dit(values, plain.objective.denoiser)
  save_file(file, tmp_path / 'dit.safetensors')
  verbs.convert(plain, str(tmp_path / 'a'), str(tmp_path / 'dit.safetensors'))

  exp = patched(tmp_path / 'a', item='ema/0.9', frames=1, denoiser=image)
  start = started(exp)
  kept = jax.tree.map(np.array, start.params)
  _, last = train(exp, start, 3)
  for params in (kept, last.params):
    network = {k: v for k, v in params['denoiser'].items() if is_base(k)}
    network['blocks'] = {
      k: v for k, v in network['blocks'].items() if is_base(k)
    }
    back = convert_dit.to_dit(network, plain.objective.denoiser)
    for name, tensor in file.items():
      np.testing.assert_array_equal(back[name], tensor, err_msg=name)
  with exp.data.train.train_batches(8, seed=1) as batches:
    batch = jax.tree.map(np.asarray, next(batches))
  first, same, later = (
    jax.jit(functools.partial(e.objective.loss, train=False))(
      p, {}, batch, jax.random.key(3)
    ).sums
    for e, p in (
      (plain, {'denoiser': values}),
      (exp, kept),
      (exp, last.params),
    )
  )
  np.testing.assert_array_equal(first, same)
  assert first != later


@pytest.mark.slow
def test_an_average_can_be_patched(base):
  _, state, workdir = base
  start = started(patched(workdir, item='ema/0.9'))
  want = state.ema['0.9']['denoiser']['final']['linear']['kernel']
  got = start.params['denoiser']['final']['linear']['kernel']
  np.testing.assert_array_equal(got, want)
