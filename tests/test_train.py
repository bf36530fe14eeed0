"""Check what the loop guarantees, for every objective.

A new objective gets these guarantees tested by adding its tiny recipe to
`RECIPES`.
"""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from vfm_jax import checkpoint, config, sharding, train
from vfm_jax.data.pipeline import Pipeline

ROOT = pathlib.Path(__file__).parents[1]
RECIPES = {
  'masked': ROOT / 'tests/recipes/tiny_masked.py',
  'denoise': ROOT / 'tests/recipes/tiny_denoise.py',
  'classify': ROOT / 'tests/recipes/tiny_classify.py',
  'latent': ROOT / 'tests/recipes/tiny_vjepa.py',
  'twlv': ROOT / 'tests/recipes/tiny_twlv.py',
}


# What the loop promises is checked for the others behind the marker `slow`.
slow_but_for_the_first = pytest.mark.parametrize(
  'recipe',
  [
    'masked',
    pytest.param('denoise', marks=pytest.mark.slow),
    pytest.param('classify', marks=pytest.mark.slow),
    pytest.param('latent', marks=pytest.mark.slow),
    pytest.param('twlv', marks=pytest.mark.slow),
  ],
  indirect=True,
  scope='module',
)


@pytest.fixture(
  params=[
    'masked',
    pytest.param('denoise', marks=pytest.mark.slow),
    pytest.param('classify', marks=pytest.mark.slow),
    pytest.param('latent', marks=pytest.mark.slow),
    pytest.param('twlv', marks=pytest.mark.slow),
  ],
  scope='module',
)
def recipe(request):
  return str(RECIPES[request.param])


def experiment(recipe, **overrides):
  """Build a recipe with values replaced by their dotted paths."""
  c = config.load(recipe)
  c.update_from_flattened_dict(overrides)
  return config.build(c)


def run_steps(exp, steps, *, devices=None, state=None):
  """Run the step on a mesh of its own; return (state, losses)."""
  mesh = sharding.make_mesh(exp.mesh, devices)
  shardings = exp.shardings(mesh)
  losses = []
  with sharding.activations(mesh):
    if state is None:
      state = exp.first_state(shardings)
    step = jax.jit(
      exp.train_step(),
      in_shardings=(
        shardings,
        sharding.batch_sharding(mesh),
        exp.teacher_shardings(mesh),
      ),
      out_shardings=(shardings, None),
    )
    teachers = exp.teachers(mesh)
    with exp.data.train.train_batches(
      exp.batch_size, seed=exp.seed, start_step=int(state.step)
    ) as batches:
      for _ in range(steps):
        batch = sharding.put_batch(next(batches), mesh)
        state, metrics = step(state, batch, teachers)
        losses.append(float(metrics['loss']))
  return state, np.array(losses)


def assert_close(a, b, atol):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), a, b
  )


@pytest.fixture(scope='module')
def one_device(recipe):
  return run_steps(experiment(recipe), 5, devices=jax.devices()[:1])


@slow_but_for_the_first
@pytest.mark.parametrize(
  'mesh',
  [
    pytest.param({'data': 8}, id='data', marks=pytest.mark.slow),
    pytest.param({'data': 2, 'fsdp': 4}, id='fsdp', marks=pytest.mark.slow),
    pytest.param({'data': 1, 'fsdp': 4, 'tensor': 2}, id='fsdp-tensor'),
  ],
)
def test_sharded_runs_equal_one_device(recipe, one_device, mesh):
  exp = experiment(recipe, **{f'mesh.{k}': v for k, v in mesh.items()})
  state, losses = run_steps(exp, 5)
  np.testing.assert_allclose(losses, one_device[1], rtol=0, atol=1e-5)
  # Adam divides by the root of tiny second moments, so parameters are
  # compared on the scale of a step of the learning rate.
  assert_close(state.params, one_device[0].params, 1e-5)
  if mesh.get('fsdp', 1) > 1:
    kernel = max(jax.tree.leaves(state.params), key=lambda x: x.size)
    assert kernel.addressable_shards[0].data.size < kernel.size


@slow_but_for_the_first
def test_accumulation_changes_nothing(recipe, one_device):
  exp = experiment(recipe, accum=4)
  state, losses = run_steps(exp, 5, devices=jax.devices()[:1])
  np.testing.assert_allclose(losses, one_device[1], rtol=0, atol=1e-6)
  assert_close(state.params, one_device[0].params, 1e-6)


@slow_but_for_the_first
def test_a_run_survives_kill_9_bit_for_bit(recipe, tmp_path):
  """30 steps equal 30 steps that were killed after the checkpoint at 15."""
  killed, straight = tmp_path / 'killed', tmp_path / 'straight'
  # One after the other: the second finds compiled what the first left.
  finish(start(recipe, straight))
  process = start(recipe, killed)
  saved = killed / 'checkpoints' / '15' / 'commit_success.txt'
  while not saved.exists():
    assert process.poll() is None, process.communicate()
    time.sleep(0.002)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert not (killed / 'checkpoints' / '30' / 'commit_success.txt').exists()
  finish(start(recipe, killed))

  exp = experiment(recipe)
  mesh = sharding.make_mesh(exp.mesh, jax.devices()[:1])
  a, b = (exp.restore(str(d), mesh) for d in (killed, straight))
  assert int(a.step) == int(b.step) == 30
  jax.tree.map(np.testing.assert_array_equal, a, b)
  lines = (killed / 'metrics.jsonl').read_text().splitlines()
  steps = [json.loads(line)['step'] for line in lines]
  assert steps == sorted(set(steps)), 'a resumed curve must not double'


@slow_but_for_the_first
def test_eight_devices_restore_onto_four_and_one(recipe, tmp_path):
  exp = experiment(recipe, **{'mesh.data': 2, 'mesh.fsdp': 4})
  state, _ = run_steps(exp, 3)
  with exp.checkpointer(str(tmp_path)) as saved:
    saved.save(3, state, force=True)
  _, expected = run_steps(exp, 3, state=state)
  for count, sizes in ((4, {'mesh.fsdp': 2}), (1, {})):
    small = experiment(recipe, **sizes)
    mesh = sharding.make_mesh(small.mesh, jax.devices()[:count])
    restored = small.restore(str(tmp_path), mesh)
    _, losses = run_steps(
      small, 3, devices=jax.devices()[:count], state=restored
    )
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-6)


def test_results_and_pictures(recipe, tmp_path):
  exp = experiment(recipe, steps=6, log_every=2)
  results = train.train(exp, str(tmp_path))
  # Classes of so few clips are not learned in six steps.
  if recipe != str(RECIPES['classify']):
    assert results['loss/last'] < results['loss/first']
  for name in ('curves.png', 'results.json', 'metrics.jsonl'):
    assert (tmp_path / name).stat().st_size > 100
  kinds = {p.suffix for p in (tmp_path / 'media').iterdir()}
  assert kinds >= {'.png', '.gif'}
  assert list((tmp_path / 'events').iterdir())


def broken_from(step, exp, value):
  """Return the pipeline's batches with a bad video from a step on."""

  class Broken(Pipeline):
    def train_batches(self, *args, start_step=0, **kwargs):
      inner = Pipeline.train_batches(
        self, *args, start_step=start_step, **kwargs
      )
      stats = inner.stats

      class Batches:
        def __init__(self):
          self.stats, self.at = stats, start_step

        def __iter__(self):
          return self

        def __next__(self):
          batch = next(inner)
          if self.at >= step:
            batch['video'] = np.full(batch['video'].shape, value, np.float32)
          else:
            batch['video'] = batch['video'].astype(np.float32) / 255
          self.at += 1
          return batch

      return Batches()

  pipe = exp.data.train
  values = {f.name: getattr(pipe, f.name) for f in dataclasses.fields(pipe)}
  data = dataclasses.replace(exp.data, train=Broken(**values))
  return dataclasses.replace(exp, data=data)


@slow_but_for_the_first
def test_non_finite_steps_stop_the_run_and_name_parameters(recipe, tmp_path):
  exp = experiment(recipe, steps=40, log_every=2, max_skipped=3)
  exp = broken_from(8, exp, np.nan)
  with pytest.raises(
    train.NonFiniteError, match=r'3 steps in a row up to 11 .*blocks_0'
  ):
    train.train(exp, str(tmp_path))


def start(recipe, workdir, *overrides):
  """Start a run on one device in a process of its own."""
  env = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1'}
  return subprocess.Popen(
    [
      sys.executable,
      '-m',
      'vfm_jax.main',
      f'--config={recipe}',
      f'--workdir={workdir}',
      *overrides,
    ],
    cwd=ROOT,
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def finish(process):
  """Wait for a run to end well; return what it printed."""
  printed, _ = process.communicate(timeout=300)
  assert process.returncode == 0, printed
  return printed


@slow_but_for_the_first
def test_sigterm_saves_and_leaves(recipe, tmp_path):
  process = start(recipe, tmp_path, '--config.steps=100000')
  log = tmp_path / 'metrics.jsonl'
  while not (log.exists() and log.read_text()):
    assert process.poll() is None, process.communicate()
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  printed = finish(process)
  assert 'Preempted: saved step' in printed
  exp = experiment(recipe, steps=100000)
  mesh = sharding.make_mesh(exp.mesh, jax.devices()[:1])
  assert int(exp.restore(str(tmp_path), mesh).step) > 5


# Each starts the whole command: one mistake in the text, one in the values.
@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    (('--config.objective.mask.ration=0.5',), 'ration'),
    (('--config.objective.encoder.patch=7',), 'encoder.patch'),
    *(
      pytest.param(*mistake, marks=pytest.mark.slow)
      for mistake in (
        (('--config.steps=many',), 'steps'),
        (('--config.accum=3',), 'config.accum=3'),
        (('--config.mesh.fsdp=3',), 'config.mesh'),
        (('--config.batch_size=6', '--config.mesh.data=8'), 'config.mesh'),
        (('--workdir=/proc/nowhere',), '--workdir'),
      )
    ),
  ],
)
def test_mistakes_end_in_one_clear_message(overrides, message, tmp_path):
  """The whole command: no traceback, the path to change, exit status 1."""
  process = start(RECIPES['masked'], tmp_path, *overrides)
  printed, _ = process.communicate(timeout=120)
  assert process.returncode == 1, printed
  assert 'Traceback' not in printed
  assert message in printed


def test_a_checkpoint_of_another_model_is_named_and_kept(tmp_path):
  recipe = str(RECIPES['masked'])
  exp = experiment(recipe, steps=2)
  mesh = sharding.make_mesh(exp.mesh)
  with exp.checkpointer(str(tmp_path)) as saved:
    saved.save(2, exp.first_state(exp.shardings(mesh)), force=True)
  other = experiment(recipe, steps=2, **{'objective.encoder.depth': 3})
  with pytest.raises(checkpoint.CheckpointError, match='blocks_2'):
    train.train(other, str(tmp_path))
  exp.restore(str(tmp_path), mesh)


def test_labels_beyond_the_classes_stop_the_run(tmp_path):
  recipe = str(RECIPES['denoise'])
  exp = experiment(recipe, **{'objective.denoiser.num_classes': 1})
  with pytest.raises(ValueError, match=r"expected 'shape' from 0 to 0 .*found"):
    train.train(exp, str(tmp_path))
