"""Run on real machines: start-up, preemption, hangs, profiles, memory."""

import atexit
import contextlib
import faulthandler
import os
import pathlib
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from vfm_jax import rendezvous
from vfm_jax.rendezvous import StartError

__all__ = [
  'Preemption',
  'Profiler',
  'StartError',
  'Watchdog',
  'compilation_cache',
  'initialize',
  'memory_stats',
  'shared_fate',
]

# Exit status of a run that its watchdog has ended.
HUNG = 75

# The other processes of the run, once this one has met them.
_company: rendezvous.Company | None = None


def initialize(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  facts: Mapping[str, str] | None = None,
  start_timeout_s: float | None = None,
  peer_timeout_s: float | None = None,
) -> bool:
  """Start `jax.distributed` if this process is one of several.

  Without arguments the environment decides: JAX_COORDINATOR_ADDRESS,
  JAX_NUM_PROCESSES and JAX_PROCESS_ID together; else what JAX itself finds
  out under Slurm, Open MPI and on a TPU pod. A pod whose hosts have no
  TPU_WORKER_HOSTNAMES looks like one machine: set VFM_JAX_DISTRIBUTED=1
  there. Call it before anything touches a device.

  The processes meet first, see `rendezvous`; from then on one that dies ends
  the others, which name it.

  Args:
    coordinator: host:port of process 0.
    num_processes: number of processes.
    process_id: which of them this is.
    facts: what must be the same for all, by name.
    start_timeout_s: seconds to wait for all; VFM_JAX_START_TIMEOUT_S or 300.
    peer_timeout_s: seconds of silence of a process that count as its death;
      VFM_JAX_PEER_TIMEOUT_S or 600. One that is killed is known at once, a
      machine that is gone to JAX after 100: this is for what hangs in Python.

  Returns:
    Whether there are several processes.

  Raises:
    ValueError: some but not all three are given.
    StartError: names the processes that are missing, or that differ.
  """
  if jax.distributed.is_initialized():
    return jax.process_count() > 1
  env = os.environ
  given: dict[str, Any] = {
    'coordinator': coordinator or env.get('JAX_COORDINATOR_ADDRESS'),
    'num_processes': _number(num_processes, env.get('JAX_NUM_PROCESSES')),
    'process_id': _number(process_id, env.get('JAX_PROCESS_ID')),
  }
  missing = [name for name, value in given.items() if value is None]
  if missing and len(missing) < 3:
    raise ValueError(
      'several processes need all of coordinator, num_processes and '
      f'process_id; missing: {", ".join(missing)} (flags, or the environment '
      'variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID)'
    )
  if missing and not _cluster(env):
    return False
  place: tuple[Any, ...] = _found() if missing else tuple(given.values())
  start = _seconds(start_timeout_s, 'VFM_JAX_START_TIMEOUT_S', 300.0)
  silence = _seconds(peer_timeout_s, 'VFM_JAX_PEER_TIMEOUT_S', 600.0)
  _meet(place, facts or {}, start, silence)
  # Where a launcher says more, as which devices are this process's, JAX asks.
  jax.distributed.initialize(*([] if missing else place))
  logging.info(
    'Process %d of %d, %d local and %d global devices.',
    jax.process_index(),
    jax.process_count(),
    jax.local_device_count(),
    jax.device_count(),
  )
  return jax.process_count() > 1


@contextlib.contextmanager
def shared_fate() -> Iterator[None]:
  """Tell the other processes if this one ends with an error."""
  try:
    yield
  except BaseException as e:
    if _company is not None:
      _company.failed(e)
      # JAX would wait for the others at the door, which are gone.
      atexit.register(_go)
    raise


def compilation_cache(directory: str) -> None:
  """Keep compiled programs in a directory, for the next start of a run.

  One that JAX_COMPILATION_CACHE_DIR names, for many runs to share, stays.
  """
  options: Any = jax.config  # its annotations know no options
  if options.jax_compilation_cache_dir is not None:
    return
  pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
  jax.config.update('jax_compilation_cache_dir', directory)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 1.0)


class Preemption:
  """Notice SIGTERM, and let all processes agree on the step to leave at.

  A context manager; the handlers that were there before are put back.
  """

  def __init__(self, agree_every: int = 20):
    """Ask the other processes at multiples of `agree_every` steps."""
    self._agree_every = agree_every
    self._flag = threading.Event()
    self._previous: Any = None

  def __enter__(self) -> 'Preemption':
    # Python allows handlers in the main thread only; elsewhere (a notebook's
    # worker, a test) the owner of the main thread decides what SIGTERM does.
    if threading.current_thread() is threading.main_thread():
      self._previous = signal.signal(signal.SIGTERM, self._handle)
    return self

  def __exit__(self, *exc) -> None:
    if self._previous is not None:
      signal.signal(signal.SIGTERM, self._previous)
      self._previous = None

  def requested(self, step: int) -> bool:
    """Say whether to save and leave now; the same on every process.

    With several processes the answer is yes only at multiples of
    `agree_every`: the cost is one tiny all-gather then, none otherwise.
    """
    if jax.process_count() == 1:
      return self._flag.is_set()
    if step % self._agree_every:
      return False
    flags = multihost_utils.process_allgather(np.asarray(self._flag.is_set()))
    return bool(np.any(flags))

  def _handle(self, signum: int, frame: Any) -> None:
    del signum, frame
    self._flag.set()


class Watchdog:
  """Report where every thread is when no step finishes for too long.

  A context manager with a thread of its own. The clock starts at the first
  beat, so that compilation of the first step does not count as a hang.
  """

  def __init__(
    self, timeout_s: float, *, abort: bool = False, log_path: str | None = None
  ):
    """Watch for a pause between beats.

    Args:
      timeout_s: seconds between two beats that count as a hang.
      abort: end the process with status `HUNG`, for a scheduler to restart.
      log_path: file that the stack traces are added to, besides stderr.
    """
    if timeout_s <= 0:
      raise ValueError(f'config.watchdog_s={timeout_s}: must be positive')
    self._timeout, self._abort, self._log_path = timeout_s, abort, log_path
    self._stop = threading.Event()
    self._last: tuple[int, float] | None = None
    self._reported: int | None = None
    self._thread = threading.Thread(
      target=self._watch, name='watchdog', daemon=True
    )

  def __enter__(self) -> 'Watchdog':
    self._thread.start()
    return self

  def __exit__(self, *exc) -> None:
    self._stop.set()
    self._thread.join()

  def beat(self, step: int) -> None:
    """Say that a step has finished."""
    self._last = (step, time.monotonic())

  def _watch(self) -> None:
    while not self._stop.wait(min(self._timeout / 4, 10.0)):
      if self._last is None:
        continue
      step, when = self._last
      pause = time.monotonic() - when
      if pause > self._timeout and self._reported != step:
        self._reported = step
        self._report(step, pause)

  def _report(self, step: int, pause: float) -> None:
    text = (
      f'watchdog: no step has finished for {pause:.0f} s '
      f'(limit {self._timeout:g} s); the last was step {step}. '
      'Stacks of all threads:\n'
    )
    with contextlib.ExitStack() as stack:
      outputs: list[TextIO] = [sys.__stderr__ or sys.stderr]
      if self._log_path is not None:
        outputs.append(stack.enter_context(open(self._log_path, 'a')))
      for out in outputs:
        out.write(text)
        out.flush()
        faulthandler.dump_traceback(out, all_threads=True)
    if self._abort:
      # The main thread hangs in native code: no exception would reach it.
      os._exit(HUNG)


class Profiler:
  """Trace the steps from `start` to `stop`, both included."""

  def __init__(self, directory: str, start: int, stop: int):
    """Write the trace of the steps under `directory`."""
    if not 0 < start <= stop:
      raise ValueError(
        f'config.profile=({start}, {stop}): expected 0 < start <= stop'
      )
    self._directory, self._start, self._stop = directory, start, stop
    self._on = False

  def step(self, step: int) -> None:
    """Say that a step was dispatched; the trace begins before `start`."""
    if self._on and step >= self._stop:
      self.close()
    elif not self._on and self._start - 1 <= step < self._stop:
      jax.profiler.start_trace(self._directory)
      self._on = True

  def close(self) -> None:
    """End the trace if it is on."""
    if self._on:
      self._on = False
      # Steps are dispatched ahead: a device runs its programs in order, so
      # what is put last says when the traced steps have ended.
      for device in jax.local_devices():
        (jax.device_put(0.0, device) + 1.0).block_until_ready()
      jax.profiler.stop_trace()


def memory_stats() -> dict[str, int]:
  """Return bytes in use and at the peak: the fullest local device.

  The CPU has no such counters: there it is the process, as
  `host_bytes_in_use` and `host_peak_bytes`.
  """
  stats = [d.memory_stats() for d in jax.local_devices()]
  known = [s for s in stats if s]
  if known:
    return {
      'device_bytes_in_use': max(s['bytes_in_use'] for s in known),
      'device_peak_bytes': max(s['peak_bytes_in_use'] for s in known),
    }
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # Linux counts in KiB, macOS in bytes.
  peak *= 1 if sys.platform == 'darwin' else 1024
  statm = pathlib.Path('/proc/self/statm')
  if not statm.exists():
    return {'host_peak_bytes': peak}
  used = int(statm.read_text().split()[1]) * resource.getpagesize()
  return {'host_bytes_in_use': used, 'host_peak_bytes': max(peak, used)}


def _cluster(env: Mapping[str, str]) -> bool:
  """Say whether a launcher started several processes that JAX can find."""
  sizes = ('SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE')
  return (
    any(int(env.get(name, 1)) > 1 for name in sizes)
    or ',' in env.get('TPU_WORKER_HOSTNAMES', '')
    or 'MEGASCALE_COORDINATOR_ADDRESS' in env
    or env.get('VFM_JAX_DISTRIBUTED') == '1'
  )


def _go() -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(1)


def _found() -> tuple[str, int, int]:
  """Return coordinator, number of processes and rank, as JAX finds them."""
  # There is no public name for what `jax.distributed.initialize` does first.
  from jax._src import clusters

  found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
    None, None, None, None, None, 300
  )
  coordinator, count, rank = found[:3]
  if coordinator is None or count is None or rank is None:
    raise ValueError(
      'several processes were started, but JAX knows no such cluster: give '
      '--coordinator, --num_processes and --process_id'
    )
  return coordinator, count, rank


def _meet(place, facts, start_timeout_s, peer_timeout_s) -> None:
  global _company
  coordinator, count, rank = place
  if count == 1:
    return
  _company = rendezvous.meet(coordinator, count, rank, facts, start_timeout_s)
  _company.watch(peer_timeout_s)
  atexit.register(_company.leave)


def _seconds(given: float | None, name: str, default: float) -> float:
  return float(os.environ.get(name, default)) if given is None else given


def _number(given: int | None, text: str | None) -> int | None:
  return int(text) if given is None and text is not None else given
