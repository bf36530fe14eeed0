"""Compute a value once per process, whichever thread asks first."""

import functools
import threading
from collections.abc import Callable
from typing import Any


def once(maxsize: int = 8) -> Callable[[Callable], Callable]:
  """Cache a function per process, and run it in one thread at a time.

  `functools.lru_cache` lets several threads that miss together compute the
  same value; for a decoded film that costs both time and memory.

  Args:
    maxsize: number of results to keep; the least recently used goes first.
  """

  def decorate(fn: Callable) -> Callable:
    cached = functools.lru_cache(maxsize)(fn)
    lock = threading.Lock()

    @functools.wraps(fn)
    def wrapper(*args: Any) -> Any:
      with lock:
        return cached(*args)

    return wrapper

  return decorate
