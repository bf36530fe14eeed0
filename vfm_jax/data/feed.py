"""Read examples ahead in threads or processes, and batch them.

There is no state to save: the batch of a step is a function of (seed, step),
whatever the number of workers and hosts, so a run resumes at any step on any
number of them.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from vfm_jax.data import batches as batches_lib


class Loader(Protocol):
  """Load the example at a position of this process; picklable.

  Attributes:
    local_size: examples of this process in a batch.
  """

  @property
  def local_size(self) -> int:
    """Return the number of examples of this process in a batch."""
    ...

  def __call__(self, local: int) -> dict[str, Any]:
    """Return the example, with its reports under `examples.BAD`."""
    ...


def local_size(batch_size: int, process_count: int) -> int:
  """Return the examples of a process in a batch.

  Raises:
    ValueError: the batch does not divide by the processes.
  """
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(
      f'batch_size: {batch_size} does not divide by the {process_count} '
      'processes'
    )
  return batch_size // process_count


def batches(
  loader: Loader,
  stack: Callable[[list[dict[str, Any]]], dict[str, Any]],
  limit: batches_lib.Limit,
  *,
  start_step: int = 0,
  steps: int | None = None,
  workers: int = 0,
  threads: int = 4,
) -> batches_lib.Batches:
  """Wire a loader of examples to grain.

  Args:
    loader: of one example.
    stack: makes a batch of examples.
    limit: how many unusable examples are too many.
    start_step: step of the first batch.
    steps: number of batches; None for no end.
    workers: processes that prepare batches; 0 uses threads of this one.
    threads: threads that read ahead where there are no worker processes.
  """
  local = loader.local_size

  def start() -> Iterator[dict[str, Any]]:
    grain = import_grain()
    # Far more steps than any run has stand for no end.
    stop = start_step + 2**40 if steps is None else steps
    dataset = grain.MapDataset.range(start_step * local, stop * local)
    dataset = dataset.map(loader)
    if not workers:
      # Threads work on examples, so one batch is ready soon.
      dataset = dataset.to_iter_dataset(read_options(threads, 2 * local))
      return iter(dataset.batch(local, batch_fn=stack))
    # Worker w takes the batches w, w + workers, ...: order is kept.
    dataset = dataset.batch(local, batch_fn=stack).to_iter_dataset(
      grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    )
    options = grain.MultiprocessingOptions(
      num_workers=workers, per_worker_buffer_size=2
    )
    return iter(dataset.mp_prefetch(options))

  return batches_lib.Batches(start, limit)


def read_options(threads: int, ahead: int) -> Any:
  """Return how far threads read ahead."""
  return import_grain().ReadOptions(
    num_threads=threads, prefetch_buffer_size=max(threads, ahead)
  )


def import_grain() -> Any:
  """Import grain late: it is slow, and only iterating needs it."""
  import grain.python as grain
  from absl import flags

  # Grain reads absl flags; a notebook or a test never parses them.
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  return grain
