"""Check runs of several processes on this machine (gloo collectives)."""

import importlib.util
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from vfm_jax import config, rendezvous, sharding

ROOT = pathlib.Path(__file__).parents[1]
RECIPE = str(ROOT / 'tests/recipes/tiny_masked.py')
WORKER = ROOT / 'tests/workers/batches.py'
DEVICES = 4
# Parameters are cut over all processes, and so are the batches.
OVERRIDES = {'mesh.data': 1, 'mesh.fsdp': DEVICES, 'log_every': 1}
PROCESSES = pytest.mark.parametrize(
  'count', [2, pytest.param(4, marks=pytest.mark.slow)]
)


def experiment(**overrides):
  """Build the recipe with values replaced by their dotted paths."""
  c = config.load(RECIPE)
  c.update_from_flattened_dict(OVERRIDES | overrides)
  return config.build(c)


def launch(count, command):
  """Start `command(coordinator, rank)` once a rank, DEVICES in all."""
  with socket.socket() as s:
    s.bind(('localhost', 0))
    coordinator = f'localhost:{s.getsockname()[1]}'
  env = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': str(DEVICES // count),
    'PYTHONPATH': str(ROOT),
  }
  return [
    subprocess.Popen(
      [sys.executable, *command(coordinator, rank)],
      cwd=ROOT,
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for rank in range(count)
  ]


def start(count, workdir, *, recipe=RECIPE, own=None, absent=(), **overrides):
  """Start a run as a user does, one command a process.

  Args:
    count: number of processes.
    workdir: of all.
    recipe: of all.
    own: {rank: further arguments of a process}.
    absent: ranks that are not started.
    **overrides: of the config.
  """
  values = [f'--config.{k}={v}' for k, v in (OVERRIDES | overrides).items()]

  def command(coordinator, rank):
    if rank in absent:
      return ['-c', '']
    several = (
      f'--coordinator={coordinator}',
      f'--num_processes={count}',
      f'--process_id={rank}',
    )
    return [
      '-m',
      'vfm_jax.main',
      f'--config={recipe}',
      f'--workdir={workdir}',
      *values,
      *(several if count > 1 else ()),
      *(own or {}).get(rank, ()),
    ]

  return launch(count, command)


def finish(processes):
  """Wait for all to end well; return (stdout, stderr) of each."""
  try:
    outputs = [p.communicate(timeout=600) for p in processes]
  finally:
    for p in processes:
      p.kill()
  for p, (_, err) in zip(processes, outputs, strict=True):
    assert p.returncode == 0, err[-3000:]
  return outputs


def fail(processes, timeout=280):
  """Wait for all to end badly; return (status, stderr) of each."""
  try:
    outputs = [p.communicate(timeout=timeout) for p in processes]
  finally:
    for p in processes:
      p.kill()
  return [
    (p.returncode, err) for p, (_, err) in zip(processes, outputs, strict=True)
  ]


def wait_for_steps(processes, workdir):
  log = pathlib.Path(workdir, 'metrics.jsonl')
  while not (log.exists() and log.read_text()):
    for p in processes:
      assert p.poll() is None, p.communicate()[1][-3000:]
    time.sleep(0.02)


def curve(workdir):
  """Return {step: loss} of a run that reports every step."""
  lines = pathlib.Path(workdir, 'metrics.jsonl').read_text().splitlines()
  points = [json.loads(line) for line in lines]
  found = {p['step']: p['loss'] for p in points if 'loss' in p}
  assert len(found) == len([p for p in points if 'loss' in p])
  return found


def assert_same_curve(a, b):
  assert a.keys() == b.keys()
  np.testing.assert_allclose(list(a.values()), list(b.values()), atol=1e-6)


def mesh_of(exp):
  return sharding.make_mesh(exp.mesh, jax.devices()[:DEVICES])


def saved_params(exp, workdir):
  mesh = mesh_of(exp)
  return jax.device_get(exp.restore(str(workdir), mesh).params)


@pytest.fixture(scope='module')
def one_process(tmp_path_factory):
  """Run one process on as many devices."""
  folder = tmp_path_factory.mktemp('one')
  finish(start(1, folder, steps=6))
  return folder


@PROCESSES
def test_several_processes_equal_one(count, tmp_path, one_process):
  finish(start(count, tmp_path, steps=6))
  assert list(curve(tmp_path)) == [1, 2, 3, 4, 5, 6]
  assert_same_curve(curve(tmp_path), curve(one_process))
  for name in ('config.txt', 'curves.png', 'results.json'):
    assert (tmp_path / name).stat().st_size > 100
  # One process reads what several wrote, each its part.
  exp = experiment(steps=6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    saved_params(exp, tmp_path),
    saved_params(exp, one_process),
  )


@pytest.mark.slow
@PROCESSES
def test_batches_and_agreement(count, tmp_path):
  spec = importlib.util.spec_from_file_location('batches', WORKER)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  processes = launch(
    count,
    lambda coordinator, rank: [
      WORKER,
      RECIPE,
      str(tmp_path),
      coordinator,
      str(count),
      str(rank),
    ],
  )
  seen = [json.loads(out.splitlines()[-1]) for out, _ in finish(processes)]
  exp = experiment()
  alone = module.digests(exp, mesh_of(exp), workers=0)
  assert len(set(alone)) == len(alone)
  for rank, r in enumerate(seen):
    assert r['digests'] == {'0': alone, '1': alone}
    assert r['due']
    assert r['slots']['fsdp'] == [rank, count]
    # Processes of one device each load the same rows in pairs.
    shared = 2 if count == DEVICES else 1
    assert r['slots']['mixed'] == [rank // shared, count // shared]
    assert r['slots']['tensor'] == [0, 1]


@pytest.mark.slow
def test_sigterm_to_one_process_saves_once_and_all_leave(tmp_path):
  processes = start(2, tmp_path, steps=400, **{'checkpoint.every_steps': 1000})
  wait_for_steps(processes, tmp_path)
  processes[1].send_signal(signal.SIGTERM)
  outputs = finish(processes)
  said = [re.findall(r'Preempted: saved step (\d+)', err) for _, err in outputs]
  assert said[0] == said[1]
  (step,) = map(int, said[0])
  assert 0 < step < 400
  kept = [p.name for p in (tmp_path / 'checkpoints').iterdir()]
  assert kept == [str(step)]
  # One process goes on where two left, and nothing shows in the curve.
  before = curve(tmp_path)
  assert list(before) == list(range(1, step + 1))
  finish(start(1, tmp_path, steps=step + 4))
  assert list(curve(tmp_path)) == list(range(1, step + 5))


@pytest.mark.slow
def test_four_processes_then_two_then_one_continue_the_curve(tmp_path):
  # The schedule of the recipe depends on the steps of the run.
  recipe = tmp_path / 'constant.py'
  recipe.write_text(
    'from vfm_jax import schedules\n'
    'from vfm_jax.config import bind, load\n'
    'def get_config(arg=None):\n'
    f'  config = load({RECIPE!r})\n'
    '  with config.unlocked():\n'
    '    config.optim.lr = bind(schedules.constant, value=1e-3)\n'
    '  return config\n'
  )
  straight, parts = tmp_path / 'straight', tmp_path / 'parts'
  finish(start(1, straight, recipe=recipe, steps=9))
  for count, steps in ((4, 3), (2, 6), (1, 9)):
    finish(start(count, parts, recipe=recipe, steps=steps))
  assert len(curve(parts)) == 9
  assert_same_curve(curve(parts), curve(straight))


@pytest.mark.slow
def test_a_process_that_differs_is_named_before_anything_starts(tmp_path):
  odd = ['--config.optim.lr.peak=0.5', '--config.data.train.source.count=72']
  ends = fail(start(3, tmp_path, steps=4, own={1: odd}))
  for status, said in ends:
    assert status == 1
    assert 'StartError: processes differ, and none starts' in said
    lines = [x for x in said.splitlines() if x.startswith('  process')]
    assert all(x.startswith('  process 1 (') for x in lines)
    text = '\n'.join(lines)
    assert 'config: found data.train.source.count = 72; optim.lr.peak' in text
    assert 'expected data.train.source.count = 64; optim.lr.peak' in text
    assert 'data: found data.train.source: 72 examples' in text
  assert not (tmp_path / 'metrics.jsonl').exists()


@pytest.mark.slow
def test_half_a_launch_names_who_is_missing(tmp_path, monkeypatch):
  monkeypatch.setenv('VFM_JAX_START_TIMEOUT_S', '20')
  ends = fail(start(4, tmp_path, steps=4, absent=(2, 3)))
  for rank in (0, 1):
    status, said = ends[rank]
    assert status == 1
    assert 'StartError: missing after 20 s: process 2, 3 of 4' in said


@pytest.mark.slow
@pytest.mark.parametrize('dies', [1, 0])
def test_a_death_ends_the_others_with_the_name(tmp_path, dies):
  processes = start(4, tmp_path, steps=100_000)
  wait_for_steps(processes, tmp_path)
  processes[dies].kill()
  begun = time.monotonic()
  ends = fail(processes)
  assert time.monotonic() - begun < 60
  for rank in set(range(4)) - {dies}:
    status, said = ends[rank]
    assert status != 0
    # The runtime of JAX may be the first to notice that process 0 is gone.
    named = f'process {dies} (' in said or (not dies and 'leader task' in said)
    assert named, said[-3000:]


@pytest.mark.slow
def test_an_error_of_one_process_is_told_by_the_others():
  worker = ROOT / 'tests/workers/fails.py'
  processes = launch(
    4, lambda coordinator, rank: [worker, coordinator, '4', str(rank)]
  )
  *others, (status, said) = fail(processes, timeout=90)
  assert status == 1
  assert 'ValueError: no such video' in said
  for status, said in others:
    assert status == rendezvous.LOST
    assert 'process 3 (' in said
    assert 'has failed with ValueError: no such video' in said
