"""Iterate over batches, and keep account of bad videos and of waiting."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from absl import logging

from vfm_jax.data import examples


class TooManyBadVideos(RuntimeError):
  """More of the data is unusable than the configuration allows."""


@dataclasses.dataclass
class Stats:
  """Count what this process has read.

  Attributes:
    seen: examples handed out.
    replaced: those whose own video was unusable: replaced by a neighbour in
      training, left out of an evaluation.
    bad: reason by name of every unusable video met so far.
    wait_s: seconds that the consumer has waited for batches, in all.
  """

  seen: int = 0
  replaced: int = 0
  bad: dict[str, str] = dataclasses.field(default_factory=dict)
  wait_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Limit:
  """Say how many bad videos are too many.

  Attributes:
    rate: highest part of the examples that may be bad.
    grace: examples to see before the rate counts.
    path: config path of the pipeline.
  """

  rate: float
  grace: int
  path: str


class Batches(Iterator[dict[str, Any]]):
  """Iterate over host-local batches; see `Pipeline`.

  Attributes:
    stats: what this process has read so far.
  """

  def __init__(
    self, start: Callable[[], Iterator[dict[str, Any]]], limit: Limit
  ):
    self.stats = Stats()
    self._start = start
    self._batches: Iterator[dict[str, Any]] | None = None
    self._limit = limit
    self._taken_s = 0.0

  def __next__(self) -> dict[str, Any]:
    begin = time.perf_counter()
    if self._batches is None:
      self._batches = self._start()
    try:
      batch = next(self._batches)
    except StopIteration:
      # A whole pass is a fair sample, however small.
      self.check()
      self.close()
      raise
    finally:
      self.stats.wait_s += time.perf_counter() - begin
    self.record(json.loads(batch.pop(examples.BAD).tobytes()))
    return batch

  def take_wait_s(self) -> float:
    """Return the seconds waited since the last call."""
    taken, self._taken_s = self._taken_s, self.stats.wait_s
    return self._taken_s - taken

  def close(self) -> None:
    """Stop the threads and processes that read ahead."""
    close = getattr(self._batches, 'close', None)
    self._batches = iter(())
    if close is not None:
      close()

  def __enter__(self) -> 'Batches':
    return self

  def __exit__(self, *exc: object) -> None:
    self.close()

  def record(self, reports: list[list[list[str]] | None]) -> None:
    """Count and name bad videos.

    Args:
      reports: for each example the [name, reason] of the unusable videos that
        were met for it; None for padding.

    Raises:
      TooManyBadVideos: above the limit.
    """
    for bad in reports:
      if bad is None:
        continue
      self.stats.seen += 1
      self.stats.replaced += bool(bad)
      for name, reason in bad:
        if name not in self.stats.bad:
          self.stats.bad[name] = reason
          logging.warning('Unusable video %s: %s', name, reason)
    if self.stats.seen >= self._limit.grace:
      self.check()

  def check(self) -> None:
    """Raise `TooManyBadVideos` if too much of what was seen is bad."""
    stats, limit = self.stats, self._limit
    if stats.replaced <= limit.rate * stats.seen:
      return
    self.close()
    first = '\n'.join(
      f'  {name}: {reason}' for name, reason in list(stats.bad.items())[:10]
    )
    raise TooManyBadVideos(
      f'{stats.replaced} of {stats.seen} examples had an unusable video '
      f'({stats.replaced / stats.seen:.1%}), more than '
      f'{limit.path}.max_bad_rate={limit.rate:g} allows; repair the data or '
      f'raise the rate. {len(stats.bad)} bad videos so far:\n{first}'
    )
