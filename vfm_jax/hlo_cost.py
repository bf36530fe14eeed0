"""Add up what a compiled module does: collectives, kernels, estimated cycles.

Loops count by their trips, those whose length depends on the data by their
bound, and of a conditional the dearest branch counts. The cycles are those that
the compiler of TPUs notes for each instruction: a model of its schedule, which
knows neither collectives nor what a Pallas kernel does.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Collection, Iterable

from vfm_jax import hlo

COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)
# The custom calls that are kernels of Pallas, for TPU and for GPU.
_KERNELS = ('tpu_custom_call', 'mosaic_gpu_v2', 'mosaic_gpu')
# What the compiler writes where it has no estimate.
_NO_ESTIMATE = 2**60


@dataclasses.dataclass(frozen=True)
class Collective:
  """Hold one collective of a module.

  Attributes:
    kind: of `COLLECTIVES`.
    results: what a device has after it.
    nbytes: bytes of its operands or of its results, whichever are more, on one
      device and each time.
    times: how often a step runs it.
    op_name: where in the program it is from.
  """

  kind: str
  results: tuple[hlo.Shape, ...]
  nbytes: int
  times: int
  op_name: str


@dataclasses.dataclass(frozen=True)
class Kernel:
  """Hold one kernel of a module.

  Attributes:
    name: that the kernel was given, see `pl.pallas_call`.
    operands: what it reads.
    results: what it writes.
    times: how often a step runs it.
    cycles: of one run, None if nobody knows.
  """

  name: str
  operands: tuple[hlo.Shape, ...]
  results: tuple[hlo.Shape, ...]
  times: int
  cycles: float | None = None


@dataclasses.dataclass(frozen=True)
class Cost:
  """Hold what a module does.

  Attributes:
    cycles: estimated, of one device; 0 where the compiler estimates none.
    collectives: in the order of the module.
    kernels: in the order of the module.
    by_op: cycles by the operation that they are for, see `shares`.
  """

  cycles: float
  collectives: tuple[Collective, ...]
  kernels: tuple[Kernel, ...]
  by_op: collections.Counter

  def uncounted(self) -> list[str]:
    """Return the names of the kernels whose cycles nobody knows."""
    return sorted({k.name for k in self.kernels if k.cycles is None})


KernelCycles = Callable[[Kernel], float | None]


def unknown(kernel: Kernel) -> None:
  """Know the cycles of no kernel."""
  del kernel


def cost(text: str, kernel_cycles: KernelCycles = unknown) -> Cost:
  """Return what a step of a compiled module costs one device.

  Args:
    text: `compiled.as_text()`.
    kernel_cycles: says what one run of a kernel takes, from its schedule.
  """
  module = hlo.parse(text)
  return _Sum(module, kernel_cycles).computation(module.entry)


def gathered_activations(
  collectives: Iterable[Collective], parameters: Collection[int]
) -> list[Collective]:
  """Return the all-gathers of anything but parameters.

  A gathered array is taken for (a part of) parameters if it has as many
  elements as one of them, in the layout of one layer or of all.

  Args:
    collectives: of a module.
    parameters: numbers of elements that a gathered parameter may have; see
      `parameter_sizes`.
  """
  return [
    c
    for c in collectives
    if c.kind == 'all-gather'
    and any(r.size > 1 and r.size not in parameters for r in c.results)
  ]


def parameter_sizes(
  shapes: Iterable[tuple[int, ...]], parts: Iterable[int]
) -> set[int]:
  """Return the numbers of elements that gathered parameters may have.

  Args:
    shapes: of the parameters.
    parts: numbers of pieces that axes other than the gathered ones cut them
      into, as of the mesh axes `tensor` and `expert`.
  """
  sizes = {math.prod(s) for s in shapes}
  # A scanned stack is gathered layer by layer; its matrix of queries, keys and
  # values may be taken apart before.
  sizes |= {math.prod(s[1:]) for s in shapes if len(s) > 1}
  sizes |= {n // 3 for n in sizes if n % 3 == 0}
  cuts = {math.prod(c) for c in _subsets([p for p in parts if p > 1])}
  return {n // c for n in sizes for c in cuts if n % c == 0}


def _subsets(items: list[int]) -> list[list[int]]:
  if not items:
    return [[]]
  rest = _subsets(items[1:])
  return rest + [[items[0], *s] for s in rest]


class _Sum:
  """Add up the computations of a module, each of them once."""

  def __init__(self, module: hlo.Module, kernel_cycles: KernelCycles):
    self._module, self._kernel_cycles = module, kernel_cycles
    self._known: dict[str, Cost] = {}

  def computation(self, name: str) -> Cost:
    if name not in self._known:
      lines = self._module.computations[name]
      shapes = {i.name: i.results for i in lines}
      self._known[name] = _added([self._line(i, shapes, name) for i in lines])
    return self._known[name]

  def _line(self, line: hlo.Instruction, shapes, inside: str) -> Cost:
    if line.opcode == 'while':
      (body,) = line.called['body']
      return _times(self.computation(body), self._module.trips(line))
    if line.opcode == 'conditional':
      found = [self.computation(c) for c in _branches(line)]
      return max(found, key=lambda c: (c.cycles, len(c.collectives)))
    kind = line.opcode.removesuffix('-start')
    if kind in COLLECTIVES:
      return _one(collective=_collective(kind, line, shapes, inside))
    if line.opcode == 'custom-call' and _is_kernel(line):
      return self._kernel(line, shapes)
    own = line.attribute('estimated_cycles')
    cycles = int(own) if own and int(own) < _NO_ESTIMATE else 0
    total = _one(cycles=cycles, op=_label(line))
    if line.opcode not in ('fusion', 'call', 'async-start'):
      return total
    parts = [
      self._inside(c, own is not None)
      for key in ('calls', 'to_apply')
      for c in line.called.get(key, [])
    ]
    return _added([total, *parts])

  def _inside(self, name: str, estimated: bool) -> Cost:
    """Return what a called computation adds to the line that calls it."""
    found = self.computation(name)
    if estimated:
      # The estimate of a fusion is of all that is in it.
      found = dataclasses.replace(found, cycles=0, by_op=collections.Counter())
    # On TPU a collective that runs beside others is written down where it
    # starts, in each fusion that it runs beside, and where it ends.
    targets = {
      i.attribute('custom_call_target')
      for i in self._module.computations[name]
      if i.opcode == 'custom-call'
    }
    beside = name.startswith('async_collective_fusion')
    if 'AsyncCollectiveDone' in targets or (
      beside and 'AsyncCollectiveStart' not in targets
    ):
      found = dataclasses.replace(found, collectives=())
    return found

  def _kernel(self, line: hlo.Instruction, shapes) -> Cost:
    kernel = Kernel(
      name=_kernel_name(line),
      operands=tuple(s for o in line.operands for s in shapes.get(o, ())),
      results=line.results,
      times=1,
    )
    kernel = dataclasses.replace(kernel, cycles=self._kernel_cycles(kernel))
    return _one(cycles=kernel.cycles or 0, op=_label(line), kernel=kernel)


def _branches(line: hlo.Instruction) -> list[str]:
  keys = ('branch_computations', 'true_computation', 'false_computation')
  return [c for key in keys for c in line.called.get(key, [])]


def _collective(kind, line: hlo.Instruction, shapes, inside) -> Collective:
  given = [s for o in line.operands for s in shapes.get(o, ())]
  results = line.results
  if line.opcode.endswith('-start') and len(results) > len(given):
    # An asynchronous one returns its operands, its results and flags.
    results = results[len(given) : 2 * len(given)]
  if kind == 'all-reduce' and inside.startswith('all-reduce-scatter'):
    # On TPU: a fusion of an all-reduce and the slice that a device keeps.
    kind = 'reduce-scatter'
  nbytes = max(sum(s.nbytes for s in x) for x in (given, results))
  return Collective(kind, tuple(results), nbytes, 1, line.op_name)


def _is_kernel(line: hlo.Instruction) -> bool:
  return line.attribute('custom_call_target') in _KERNELS


def _kernel_name(line: hlo.Instruction) -> str:
  scopes = [p for p in line.op_name.split('/') if p != 'pallas_call']
  return scopes[-1] if scopes else line.name


def _label(line: hlo.Instruction) -> str:
  """Say in short what an instruction is for: its module and operation."""
  skipped = ('jvp', 'transpose', 'while', 'body', 'checkpoint', 'remat', 'jit')
  parts = [p for p in line.op_name.split('/') if p]
  kept = [p for p in parts[:-1] if not p.startswith((*skipped, 'closed'))]
  way = 'backward' if 'transpose(' in line.op_name else 'forward'
  last = parts[-1] if parts else line.opcode
  return f'{way} {"/".join([*kept[-1:], last])}'


def _one(
  *, cycles: float = 0, op: str = '', collective=None, kernel=None
) -> Cost:
  return Cost(
    cycles,
    () if collective is None else (collective,),
    () if kernel is None else (kernel,),
    collections.Counter({op: cycles} if cycles else {}),
  )


def _added(costs: list[Cost]) -> Cost:
  by_op = collections.Counter()
  for c in costs:
    by_op.update(c.by_op)
  return Cost(
    sum(c.cycles for c in costs),
    tuple(x for c in costs for x in c.collectives),
    tuple(x for c in costs for x in c.kernels),
    by_op,
  )


def _times(cost: Cost, n: int) -> Cost:
  return Cost(
    cost.cycles * n,
    tuple(dataclasses.replace(c, times=c.times * n) for c in cost.collectives),
    tuple(dataclasses.replace(k, times=k.times * n) for k in cost.kernels),
    collections.Counter({k: v * n for k, v in cost.by_op.items()}),
  )
