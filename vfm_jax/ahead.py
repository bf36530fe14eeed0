"""Compile the train step of a run for machines that are not here.

The step is the one that the loop runs, compiled by the compiler of the target:
its memory, its collectives and its refusal of what does not fit are real. Time
is an estimate.
"""

import dataclasses
import re
import time
from collections.abc import Iterable
from typing import Any

import jax

from vfm_jax import flops, hlo_cost, levers, sharding, topology
from vfm_jax.experiment import Experiment
from vfm_jax.objectives.encode import Encoder
from vfm_jax.ops import attention_table

# What compilers say of a step that does not fit, in two places of theirs:
# 'Used 45.60G of 15.75G hbm' and '... required for HLO temporaries (16.95G)
# exceeds available HBM (15.75G)'.
_SIZE = r'([\d.]+)([KMG]?)'
_OVERFLOW = re.compile(
  rf'[Uu]sed {_SIZE} of {_SIZE} hbm'
  rf'|\({_SIZE}\) exceeds available HBM \({_SIZE}\)'
)
_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30}
# How many operations with the most cycles are told.
_DEAREST = 12


@dataclasses.dataclass(frozen=True)
class Compiled:
  """Hold what the compiler said of a step.

  Attributes:
    seconds: that compiling took here.
    need: bytes of one device that the step needs at its peak.
    have: bytes of one device that it may use.
    temporaries: bytes of activations, gradients and copies.
    code: bytes of the program.
    cost: of one step, None where it does not fit.
  """

  seconds: float
  need: int
  have: int
  temporaries: int = 0
  code: int = 0
  cost: hlo_cost.Cost | None = None

  @property
  def fits(self) -> bool:
    """Say whether the step fits into the memory of a device."""
    return self.need <= self.have


def compile_step(
  exp: Experiment,
  target: topology.Target,
  kernel_cycles: hlo_cost.KernelCycles = hlo_cost.unknown,
) -> Compiled:
  """Compile the train step of a run for a target.

  Raises:
    TopologyError: there is no compiler for the target, or no step to compile.
    ShardingError: the recipe's mesh does not fit the target.
  """
  if isinstance(exp.objective, Encoder):
    raise topology.TopologyError(
      '--topology compiles a train step, and config.objective: Encoder takes '
      'none; leave --topology out'
    )
  # Before the minutes go by.
  sharding.check_batch(exp.batch_size, exp.mesh.sizes(target.devices))
  with attention_table.recorded():  # initial parameters are no part of a step
    state, teachers = exp.abstract_state, exp.teacher_spec
  mesh = sharding.make_mesh(exp.mesh, topology.devices(target))
  start = time.perf_counter()
  try:
    with sharding.activations(mesh.abstract_mesh):
      batch = jax.tree.map(_struct, exp.batch_spec)
      lowered = exp.jitted_step(mesh).lower(state, batch, teachers)
      compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as e:
    need, have = overflow(e)
    return Compiled(time.perf_counter() - start, need, have)
  seconds = time.perf_counter() - start
  memory = compiled.memory_analysis()
  return Compiled(
    seconds=seconds,
    need=int(memory.peak_memory_in_bytes),
    have=target.memory,
    temporaries=int(memory.temp_size_in_bytes),
    code=int(memory.generated_code_size_in_bytes),
    cost=hlo_cost.cost(compiled.as_text() or '', kernel_cycles),
  )


def overflow(error: Exception) -> tuple[int, int]:
  """Return the bytes that a step needs and has, from the compiler's refusal.

  Raises:
    Exception: the error itself, if it is about anything else.
  """
  found = _OVERFLOW.search(str(error))
  if found is None:
    raise error
  numbers = [group for group in found.groups() if group is not None]
  need, have = (
    float(number) * _UNITS[unit]
    for number, unit in zip(numbers[::2], numbers[1::2], strict=True)
  )
  return int(need), int(have)


def analyse(
  exp: Experiment,
  target: topology.Target,
  kernel_cycles: hlo_cost.KernelCycles = hlo_cost.unknown,
  *,
  with_levers: bool = False,
) -> dict[str, Any]:
  """Return all there is to know of a run on a target, as plain data.

  Args:
    exp: the run, whose mesh is laid over the target's devices.
    target: what to compile for.
    kernel_cycles: what a run of a Pallas kernel takes, by its schedule.
    with_levers: also compile with other remat policies and more microbatches,
      each of which takes as long as the first.

  Raises:
    TopologyError: see `compile_step`.
    ShardingError: the recipe's mesh does not fit the target.
  """
  found = _facts(exp, target, compile_step(exp, target, kernel_cycles))
  saved = {
    name: {'saves': n, 'compiled': False}
    for name, n in levers.exact(exp, target.devices).items()
  }
  others = levers.compiled(exp, target.devices) if with_levers else {}
  for name, other in others.items():
    facts = _facts(other, target, compile_step(other, target, kernel_cycles))
    saved[name] = {
      'saves': found['need'] - facts['need'],
      'compiled': True,
      'fits': facts['fits'],
      'need': facts['need'],
      'step_s': facts.get('step_s'),
    }
  return {
    'target': target.name,
    'kind': target.kind,
    'devices': target.devices,
    'peak_flops': target.peak_flops,
    'clock_hz': target.clock_hz,
    'jax': jax.__version__,
    'mesh': exp.mesh.sizes(target.devices),
    'batch_size': exp.batch_size,
    'accum': exp.accum,
    'remat': sorted(levers.remat_policies(exp.objective)),
    'layout': levers.layout_bytes(exp, target.devices),
    **found,
    'levers': saved,
  }


def model_flops(exp: Experiment) -> int:
  """Return the FLOPs of a step over all devices, without what remat repeats."""
  objective = levers.with_remat(exp.objective, 'none')
  plain = dataclasses.replace(exp, objective=objective)
  given = exp.abstract_state, exp.batch_spec, exp.teacher_spec
  with attention_table.recorded():  # what would run is that of this machine
    return flops.count(plain.train_step(), *given)


def _facts(
  exp: Experiment, target: topology.Target, compiled: Compiled
) -> dict[str, Any]:
  """Return what a compiled step says, as plain data."""
  work = model_flops(exp)
  data: dict[str, Any] = {
    'compile_s': compiled.seconds,
    'need': compiled.need,
    'have': compiled.have,
    'fits': compiled.fits,
    'model_flops': work,
  }
  cost = compiled.cost
  if cost is None:
    return data
  data |= {
    'temporaries': compiled.temporaries,
    'code': compiled.code,
    'collectives': by_kind(cost.collectives),
    'other_gathers': _others(exp, target, cost),
    'kernels': {
      name: {
        'runs': sum(k.times for k in cost.kernels if k.name == name),
        'counted': name not in cost.uncounted(),
      }
      for name in sorted({k.name for k in cost.kernels})
    },
  }
  if target.clock_hz is None or not cost.cycles:
    return data
  seconds = cost.cycles / target.clock_hz
  total = sum(cost.by_op.values())
  data |= {
    'step_s': seconds,
    'mfu': work / target.devices / seconds / target.peak_flops,
    'dearest': {op: n / total for op, n in cost.by_op.most_common(_DEAREST)},
  }
  return data


def by_kind(
  collectives: Iterable[hlo_cost.Collective],
) -> dict[str, dict[str, int]]:
  """Return by kind how many there are, how often they run, and their bytes.

  Bytes are those of one device in one step.
  """
  found: dict[str, dict[str, int]] = {}
  for c in collectives:
    row = found.setdefault(c.kind, {'count': 0, 'runs': 0, 'bytes': 0})
    row['count'] += 1
    row['runs'] += c.times
    row['bytes'] += c.times * c.nbytes
  return dict(sorted(found.items()))


def _others(
  exp: Experiment, target: topology.Target, cost: hlo_cost.Cost
) -> list[dict[str, Any]]:
  """Return the all-gathers of anything but parameters, the largest first."""
  sizes = exp.mesh.sizes(target.devices)
  trained = [exp.abstract_state.params, exp.teacher_spec]
  known = hlo_cost.parameter_sizes(
    [tuple(x.shape) for x in jax.tree.leaves(trained)],
    [sizes['tensor'], sizes['expert']],
  )
  other = hlo_cost.gathered_activations(cost.collectives, known)
  rows = [
    {
      'shape': [f'{r.dtype}{list(r.dims)}' for r in c.results],
      'runs': c.times,
      'bytes': c.nbytes * c.times,
      'of': c.op_name,
    }
    for c in other
  ]
  return sorted(rows, key=lambda row: -row['bytes'])


def _struct(spec: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(spec.shape, spec.dtype)
