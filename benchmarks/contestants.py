"""Share what the contestants of several benchmarks need."""

import functools
import math
import os
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import interleave

# As launch/setup.sh sets for users: glibc keeps the memory of a step.
KEEP_MEMORY = types.MappingProxyType(
  {
    'MALLOC_ARENA_MAX': '1',
    'MALLOC_MMAP_THRESHOLD_': '8589934592',
    'MALLOC_TRIM_THRESHOLD_': '17179869184',
    'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1',
  }
)
RETURN_MEMORY = types.MappingProxyType(dict.fromkeys(KEEP_MEMORY))

CORES = len(os.sched_getaffinity(0))
# The interpreter that has torch, where it is not the one that has JAX.
PEER_PYTHON = os.environ.get('PEER_PYTHON', sys.executable)


def against_torch(
  module: str, *, malloc_defaults: bool = True
) -> list[interleave.Contestant]:
  """Return torch eager, torch.compile and ours.

  Args:
    module: program that serves as `torch`, `torch_compile` and `vfm_jax`.
    malloc_defaults: add torch eager and ours with malloc as the system has it.
  """
  found = [
    interleave.Contestant(name, ('-m', module, framework), env, python)
    for name, framework, env, python in (
      ('torch eager', 'torch', KEEP_MEMORY, PEER_PYTHON),
      ('torch.compile', 'torch_compile', KEEP_MEMORY, PEER_PYTHON),
      ('vfm_jax', 'vfm_jax', KEEP_MEMORY, sys.executable),
      ('torch eager, malloc defaults', 'torch', RETURN_MEMORY, PEER_PYTHON),
      ('vfm_jax, malloc defaults', 'vfm_jax', RETURN_MEMORY, sys.executable),
    )
  ]
  return [c for c in found if malloc_defaults or c.env is KEEP_MEMORY]


def main(ours: Callable[[], None], theirs: Callable[[bool], None]) -> None:
  """Serve as the contestant that the command line names.

  Args:
    ours: serves as this library.
    theirs: serves as torch, with or without torch.compile.
  """
  {
    'vfm_jax': ours,
    'torch': functools.partial(theirs, False),
    'torch_compile': functools.partial(theirs, True),
  }[sys.argv[1]]()


def notes(what: str, peer: str) -> str:
  """Return the conditions of a comparison with torch.

  Args:
    what: one unit of work.
    peer: the class of the contestants on torch.
  """
  return (
    f'{what} in float32 on {CORES} CPU cores; malloc as launch/setup.sh sets '
    f'it, for all but the rows that say otherwise. The peer is {peer}.'
  )


def serve_train_step(
  objective: Any,
  batch: Mapping[str, Any],
  work: Mapping[str, int],
  *,
  groups: Sequence[Any] = (),
  combine: Any = None,
  same_size: bool = True,
) -> None:
  """Be the contestant of this library: an AdamW step of an objective.

  Args:
    objective: what is trained.
    batch: what it is trained on, in each step.
    work: what has to be equal for a fair comparison; the number of parameters
      is added.
    groups: of the optimizer.
    combine: makes one gradient of the objective's tasks.
    same_size: whether the number of parameters has to be equal too.
  """
  import jax

  from vfm_jax import optim, schedules, step

  init = functools.partial(step.init_params, combine=combine)
  params, _ = jax.eval_shape(lambda: init(objective, 0, batch))
  tx, rows = optim.Optimizer(
    lr=functools.partial(schedules.constant, value=1e-4), groups=tuple(groups)
  ).build(params, 1000)
  state = jax.jit(
    lambda: step.init_state(objective, tx, 0, batch, combine=combine)
  )()
  frozen = {row.path for row in rows if row.frozen}
  train_step = jax.jit(
    step.make_train_step(objective, tx, combine=combine, frozen=frozen),
    donate_argnums=0,
  )
  batch = jax.device_put(batch)

  def one():
    nonlocal state
    state, metrics = train_step(state, batch)
    jax.block_until_ready((state, metrics))

  size = {'parameters': count(jax.tree.leaves(params))}
  interleave.serve(
    one,
    work={**work, **size} if same_size else work,
    version=jax.__version__,
    **size,
  )


def count(parameters: Sequence[Any]) -> int:
  """Return the number of numbers in arrays or tensors."""
  return sum(math.prod(x.shape) for x in parameters)
