"""Check preemption, the watchdog, the profiler and start-up rules."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from vfm_jax import runtime


def test_one_process_needs_no_distributed(monkeypatch):
  for name in ('JAX_COORDINATOR_ADDRESS', 'SLURM_NTASKS'):
    monkeypatch.delenv(name, raising=False)
  assert runtime.initialize() is False


def test_half_a_description_of_the_cluster_is_an_error(monkeypatch):
  with pytest.raises(ValueError, match='missing: num_processes, process_id'):
    runtime.initialize('localhost:1234')
  monkeypatch.setenv('JAX_NUM_PROCESSES', '2')
  with pytest.raises(ValueError, match='missing: coordinator, process_id'):
    runtime.initialize()


@pytest.mark.parametrize(
  ('env', 'many'),
  [
    ({}, False),
    ({'SLURM_NTASKS': '1'}, False),
    ({'SLURM_NTASKS': '8'}, True),
    ({'TPU_WORKER_HOSTNAMES': 'localhost'}, False),
    ({'TPU_WORKER_HOSTNAMES': 'a,b'}, True),
    ({'VFM_JAX_DISTRIBUTED': '1'}, True),
  ],
)
def test_launchers(env, many, monkeypatch):
  calls = []
  monkeypatch.setattr(os, 'environ', env)
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *a: calls.append(a))
  monkeypatch.setattr(runtime, '_found', lambda: ('localhost:1', 1, 0))
  runtime.initialize()
  assert calls == ([()] if many else [])


def test_sigterm_asks_for_a_save_and_the_old_handler_returns():
  before = signal.getsignal(signal.SIGTERM)
  with runtime.Preemption() as preemption:
    assert not preemption.requested(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert preemption.requested(2)
  assert signal.getsignal(signal.SIGTERM) is before


def test_watchdog_reports_a_hang_once(tmp_path, capfd):
  log = tmp_path / 'stacks.txt'
  with runtime.Watchdog(0.1, log_path=str(log)) as watchdog:
    watchdog.beat(7)
    time.sleep(0.5)
  text = log.read_text()
  assert text.count('the last was step 7') == 1
  assert 'test_watchdog_reports_a_hang_once' in text
  assert 'no step has finished' in capfd.readouterr().err


def test_watchdog_is_silent_while_steps_finish(tmp_path):
  log = tmp_path / 'stacks.txt'
  with runtime.Watchdog(0.5, log_path=str(log)) as watchdog:
    time.sleep(0.6)  # compiling: nothing has started to beat
    for step in range(5):
      watchdog.beat(step)
      time.sleep(0.02)
  assert not log.exists()


def test_watchdog_can_end_a_process():
  code = (
    'import time\n'
    'from vfm_jax import runtime\n'
    'with runtime.Watchdog(0.1, abort=True) as w:\n'
    '  w.beat(1)\n'
    '  time.sleep(60)\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=pathlib.Path(__file__).parents[1],
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert done.returncode == runtime.HUNG
  assert 'line 5' in done.stderr


def test_profiler_traces_its_steps_only(tmp_path):
  profiler = runtime.Profiler(str(tmp_path / 'trace'), 2, 3)
  profiler.step(4)
  assert not (tmp_path / 'trace').exists()
  f = jax.jit(lambda x: x @ x)
  for step in range(1, 5):
    f(jnp.ones((4, 4)))
    profiler.step(step)
  assert list((tmp_path / 'trace').rglob('*.xplane.pb'))
  profiler.close()


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: runtime.Profiler('x', 3, 2), r'config\.profile=\(3, 2\)'),
    (lambda: runtime.Watchdog(0), r'config\.watchdog_s=0'),
  ],
)
def test_settings_that_make_no_sense(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_memory_stats():
  stats = runtime.memory_stats()
  assert 0 < stats['host_bytes_in_use'] <= stats['host_peak_bytes']


def test_compilation_cache(tmp_path):
  names = (
    'jax_compilation_cache_dir',
    'jax_persistent_cache_min_compile_time_secs',
  )
  before = {name: getattr(jax.config, name) for name in names}
  try:
    jax.config.update('jax_compilation_cache_dir', None)
    runtime.compilation_cache(str(tmp_path / 'cache'))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'cache')
    runtime.compilation_cache(str(tmp_path / 'other'))  # a user has set one
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'cache')
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
