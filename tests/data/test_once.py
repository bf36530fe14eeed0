import concurrent.futures
import time

from vfm_jax.data import once


def test_threads_that_ask_together_compute_once():
  calls = []

  @once.once()
  def slow(x):
    calls.append(x)
    time.sleep(0.05)
    return [x]

  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    results = list(pool.map(slow, [1, 1, 1, 2]))
  assert sorted(calls) == [1, 2]
  assert results[0] is results[2]
