"""Time processes against each other on a machine that is not quiet.

Each contestant is a worker process that stays alive and is warm; only one works
at a time. Rounds go A B C, B C A, C A B, ... Ratios are taken within a round.

A worker calls `serve`. The protocol is one JSON object a line: requests on its
standard input, tagged answers on its standard output, where libraries may print
what they like besides.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

_TAG = 'answer: '


class WorkerError(RuntimeError):
  """Say which worker died, and what it printed last."""


@dataclasses.dataclass(frozen=True)
class Contestant:
  """Describe a worker process.

  Attributes:
    name: how results call it.
    command: arguments of the Python interpreter.
    env: what its environment has on top of ours; None removes a variable.
    python: the interpreter; by default the one that runs this.
  """

  name: str
  command: tuple[str, ...]
  env: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
  python: str = sys.executable


def compare(
  contestants: Sequence[Contestant],
  *,
  rounds: int = 9,
  repeats: int = 2,
  settle: float = 0.5,
) -> tuple[dict[str, list[float]], dict[str, Any]]:
  """Time the contestants.

  Args:
    contestants: workers; all are alive together, so their memory adds up.
    rounds: times that each is measured.
    repeats: units of work a measurement.
    settle: seconds of rest before each measurement, in which the thread pools
      of the worker before fall asleep.

  Returns:
    Seconds a unit of work, one entry a round, and the info of each worker; both
    by name.

  Raises:
    WorkerError: a worker ended before its time, or they say that they do
      different work (`work` in their info).
  """
  with contextlib.ExitStack() as stack:
    workers = {c.name: stack.enter_context(_worker(c)) for c in contestants}
    info = {name: worker.info for name, worker in workers.items()}
    _check_same_work(info)
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    names = list(workers)
    for r in range(rounds):
      turn = r % len(names)
      for name in names[turn:] + names[:turn]:
        time.sleep(settle)
        seconds[name].append(workers[name].measure(repeats))
  return seconds, info


def serve(
  step: Callable[[], Any],
  *,
  before: Callable[[], Any] = lambda: None,
  warmup: int = 2,
  **info: Any,
) -> None:
  """Be a worker: run `step` on request until standard input closes.

  Args:
    step: one unit of work, finished when it returns.
    before: what to do, untimed, in front of each measurement.
    warmup: units of work before the worker says that it is ready.
    **info: values for JSON; `work` must be equal in all workers.
  """
  for _ in range(warmup):
    step()
  _send(info)
  for line in sys.stdin:
    repeats = json.loads(line)['repeats']
    before()
    begin = time.perf_counter()
    for _ in range(repeats):
      step()
    _send({'seconds': (time.perf_counter() - begin) / repeats})


class _Worker:
  """Speak with a worker process."""

  def __init__(self, name: str, process: subprocess.Popen, log: IO[bytes]):
    self._name, self._process, self._log = name, process, log
    self.info = self._receive()

  def measure(self, repeats: int) -> float:
    """Return seconds a unit of work."""
    with contextlib.suppress(BrokenPipeError):  # `_receive` tells the reason
      self._process.stdin.write(json.dumps({'repeats': repeats}) + '\n')
      self._process.stdin.flush()
    return self._receive()['seconds']

  def _receive(self) -> dict[str, Any]:
    for line in self._process.stdout:
      if line.startswith(_TAG):
        return json.loads(line.removeprefix(_TAG))
    status = self._process.wait()
    self._log.seek(0)
    tail = self._log.read().decode(errors='replace').splitlines()[-15:]
    raise WorkerError(
      f'the worker {self._name!r} ended with status {status}; it printed:\n  '
      + '\n  '.join(tail or ['nothing'])
    )


@contextlib.contextmanager
def _worker(contestant: Contestant) -> Iterator[_Worker]:
  env = {**os.environ, **contestant.env}
  with tempfile.TemporaryFile() as log:
    process = subprocess.Popen(
      [contestant.python, *contestant.command],
      env={k: v for k, v in env.items() if v is not None},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=log,
      text=True,
    )
    try:
      yield _Worker(contestant.name, process, log)
    finally:
      with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
      process.stdout.close()
      try:
        process.wait(timeout=20)
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _check_same_work(info: Mapping[str, Mapping[str, Any]]) -> None:
  work = {name: i.get('work') for name, i in info.items()}
  if any(w != next(iter(work.values())) for w in work.values()):
    raise WorkerError(
      'the contestants do different work:\n  '
      + '\n  '.join(f'{name}: {w}' for name, w in work.items())
    )


def _send(message: Mapping[str, Any]) -> None:
  print(_TAG + json.dumps(message), flush=True)
