"""Let the processes of a run meet before they start, and share their fate.

JAX's own start-up waits for all and then ends without a name if one is missing.
So the processes meet first, at the address of the coordinator: each says who it
is and what it is about to run; process 0 answers all with one verdict, which
names those that are missing or differ. The connections stay open: a process
that dies closes its own at once, and the others learn its name, where a
collective would hang or complain of a socket.
"""

import collections
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# Exit status of a process that ends because another one did.
LOST = 76
# Seconds between signs of life.
_BEAT = 5.0


class StartError(RuntimeError):
  """Name the processes that are missing, or that differ from the others."""


class Company:
  """Hold the connections of a process that has met the others.

  Attributes:
    count: number of processes.
    rank: which of them this is.
  """

  def __init__(
    self,
    count: int,
    rank: int,
    lines: Mapping[int, '_Line'],
    hosts: Mapping[int, str],
  ):
    """Take open connections and host names, by rank."""
    self.count, self.rank = count, rank
    self._lines, self._hosts = lines, hosts
    self._left, self._failing = threading.Event(), threading.Event()
    self._lock = threading.Lock()

  def watch(self, timeout_s: float) -> None:
    """End this process, with the name, if another one dies from now on.

    Args:
      timeout_s: seconds of silence that count as death; one that is killed is
        known at once.
    """
    tasks: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
      (self._beat, ()),
      *((self._listen, (r, timeout_s)) for r in self._lines),
    ]
    for target, args in tasks:
      threading.Thread(target=target, args=args, daemon=True).start()

  def failed(self, error: BaseException) -> None:
    """Tell the others why this process ends, unless one of them did before.

    An error of a collective is often the first sign of another one's death:
    if that is known within moments this process ends with the name of it. One
    that fails meanwhile, as all do for the same reason, changes nothing.
    """
    self._failing.set()
    time.sleep(1.0)
    self._tell({'failed': f'{type(error).__name__}: {str(error)[:500]}'})
    self.leave()

  def leave(self) -> None:
    """Say that this process has done its part."""
    if not self._left.is_set():
      self._left.set()
      self._tell({'left': self.rank})
      for line in self._lines.values():
        with contextlib.suppress(OSError):
          line.socket.shutdown(socket.SHUT_WR)

  def _beat(self) -> None:
    while not self._left.wait(_BEAT):
      self._tell({})

  def _tell(self, message: Mapping[str, Any]) -> None:
    with self._lock:
      for line in self._lines.values():
        # Whoever does not hear it any more is found out by who listens.
        with contextlib.suppress(OSError):
          line.write(message)

  def _listen(self, rank: int, timeout_s: float) -> None:
    line = self._lines[rank]
    line.socket.settimeout(timeout_s)
    while True:
      try:
        message = line.read()
      except TimeoutError:
        self._end(f'has not been heard of for {timeout_s:g} s', rank)
        return
      except OSError:
        message = None
      if message is None:
        self._end('has died', rank)
        return
      if 'left' in message:
        return
      if 'failed' in message:
        self._end(f'has failed with {message["failed"]}', rank, died=False)
        return
      if 'told' in message:
        self._end(message['told'], message['of'], died=message['died'])
        return

  def _end(self, what: str, rank: int, died: bool = True) -> None:
    if self._left.is_set() or (self._failing.is_set() and not died):
      return
    if self.rank == 0:  # the others are connected with process 0 alone
      self._tell({'told': what, 'of': rank, 'died': died})
    who, me = (_name(r, self._hosts) for r in (rank, self.rank))
    print(
      f'{who} of {self.count} {what}; {me} ends, too',
      file=sys.stderr,
      flush=True,
    )
    # The main thread may hang in a collective, which no exception would reach.
    os._exit(LOST)


def meet(
  address: str,
  count: int,
  rank: int,
  facts: Mapping[str, str],
  timeout_s: float,
) -> Company:
  """Wait for all processes, and compare what they are about to run.

  Args:
    address: host:port of process 0; the port is free again afterwards.
    count: number of processes.
    rank: which of them this is.
    facts: what must be the same for all, by name; long values are compared by
      lines.
    timeout_s: seconds to wait for the others.

  Raises:
    StartError: names the processes that are missing, or that differ.
  """
  end = time.monotonic() + timeout_s
  own = {'rank': rank, 'host': socket.gethostname(), 'facts': dict(facts)}
  if rank:
    return _join(address, count, own, timeout_s, end)
  lines, said = _gather(address, count, own, end)
  hosts = {r: s['host'] for r, s in said.items()}
  problem = _problem(count, said, timeout_s)
  for line in lines.values():
    with contextlib.suppress(OSError):
      line.write({'problem': problem, 'hosts': hosts})
  if problem:
    raise StartError(problem)
  return Company(count, 0, lines, hosts)


def _gather(
  address: str, count: int, own: dict[str, Any], end: float
) -> tuple[dict[int, '_Line'], dict[int, dict[str, Any]]]:
  """Return connections and what was said, by rank, until all came or `end`."""
  port = int(address.rpartition(':')[2])
  said, lines = {0: own}, {}
  both = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if both else socket.AF_INET
  with socket.create_server(
    ('', port), family=family, dualstack_ipv6=both
  ) as server:
    while len(said) < count and (left := end - time.monotonic()) > 0:
      server.settimeout(left)
      # Whoever is slow to introduce itself, or is no process of ours, is shown
      # out, and comes again.
      with contextlib.suppress(OSError, ValueError, KeyError):
        caller = _Line(server.accept()[0])
        caller.socket.settimeout(min(left, 10.0))
        message = caller.read()
        if message is not None and 0 < message['rank'] < count:
          said[message['rank']], lines[message['rank']] = message, caller
  return lines, said


def _join(
  address: str, count: int, own: dict[str, Any], timeout_s: float, end: float
) -> Company:
  """Introduce this process to process 0, and hear what it answers."""
  host, _, port = address.rpartition(':')
  while True:
    try:
      line = _Line(socket.create_connection((host.strip('[]'), int(port)), 5.0))
      break
    except OSError as e:
      if time.monotonic() > end:
        raise StartError(
          f'missing after {timeout_s:g} s: process 0 of {count}; nothing '
          f'answers at {address} ({e})'
        ) from e
      time.sleep(0.2)
  # Process 0 may have begun to wait later.
  line.socket.settimeout(timeout_s + 30.0)
  answer = None
  with contextlib.suppress(OSError):
    line.write(own)
    answer = line.read()
  if answer is None:
    raise StartError(f'process 0 of {count} has left before all had come')
  if answer['problem']:
    raise StartError(answer['problem'])
  hosts = {int(r): h for r, h in answer['hosts'].items()}
  return Company(count, own['rank'], {0: line}, hosts)


def _problem(
  count: int, said: Mapping[int, dict[str, Any]], timeout_s: float
) -> str:
  """Return what keeps the processes from starting together; '' for nothing."""
  if missing := sorted(set(range(count)) - said.keys()):
    names = ', '.join(str(r) for r in missing)
    came = ', '.join(_name(r, {r: s['host']}) for r, s in sorted(said.items()))
    return (
      f'missing after {timeout_s:g} s: process {names} of {count}; there are '
      f'{came}'
    )
  hosts = {r: s['host'] for r, s in said.items()}
  lines = [
    f'  {_name(rank, hosts)}: {text}'
    for fact in said[0]['facts']
    for rank, text in _differing(fact, said)
  ]
  if not lines:
    return ''
  return '\n'.join(['processes differ, and none starts:', *lines])


def _differing(
  fact: str, said: Mapping[int, dict[str, Any]]
) -> Iterator[tuple[int, str]]:
  """Yield (rank, how) of those whose fact is not what most have."""
  values = {r: s['facts'].get(fact, '') for r, s in said.items()}
  # Among equally many the first to be counted counts: process 0's.
  common = collections.Counter(values[r] for r in sorted(values)).most_common(
    1
  )[0][0]
  for rank, value in sorted(values.items()):
    if value == common:
      continue
    old, new = common.splitlines(), value.splitlines()
    found = [x for x in new if x not in old] or ['nothing more']
    wanted = [x for x in old if x not in new] or ['nothing more']
    yield (
      rank,
      f'{fact}: found {"; ".join(found[:5])}; expected {"; ".join(wanted[:5])}',
    )


def _name(rank: int, hosts: Mapping[int, str]) -> str:
  return (
    f'process {rank} ({hosts[rank]})' if rank in hosts else (f'process {rank}')
  )


class _Line:
  """Send and receive JSON objects, one a line."""

  def __init__(self, line: socket.socket):
    self.socket = line
    self._rest = b''

  def write(self, message: Mapping[str, Any]) -> None:
    """Send a message."""
    self.socket.sendall(json.dumps(message).encode() + b'\n')

  def read(self) -> dict[str, Any] | None:
    """Return the next message; None if the other end is closed."""
    while b'\n' not in self._rest:
      data = self.socket.recv(65536)
      if not data:
        return None
      self._rest += data
    line, _, self._rest = self._rest.partition(b'\n')
    return json.loads(line)
