"""Read the schedules that the TPU compiler writes for Pallas kernels.

A bundle is what a core issues in a cycle. The listing after register allocation
has the empty bundles too in which it waits for results; it knows nothing of
waiting for memory.
"""

import dataclasses
import pathlib
import re

# Makes the compiler write them; it reads this once, when it is loaded.
OPTIONS = 'LIBTPU_INIT_ARGS'

_BUNDLE = re.compile(r'^ *(0x[0-9a-f]+|0) ')
_JUMP = re.compile(r'sbr\.rel \(.*?\) target bundleno = (\d+)')


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Count the bundles of a kernel.

  Attributes:
    every: those of a grid step.
    once: those under a condition and without a product of matrices: they
      set sums to 0 in the first step of a head, or write them in the last.
    spills: registers that are stored and loaded for want of registers.
    mxu: share of the time in which the matrix units are busy, in a grid step.
  """

  every: int
  once: int
  spills: int
  mxu: float

  def cycles(self, steps: float, times: float) -> float:
    """Return the cycles of a head.

    Args:
      steps: grid steps of a head; a fraction if a step computes several heads.
      times: how often the conditions hold for a head.
    """
    return self.every * steps + self.once * times


def options(folder: str) -> str:
  """Return the value of `OPTIONS` that makes the compiler write to a folder."""
  return f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true'


def read(folder: pathlib.Path, prefix: str) -> dict[str, Schedule]:
  """Return the schedules of the kernels whose names begin with `prefix`.

  Raises:
    ValueError: there is none; the compiler writes other files, perhaps.
  """
  found = {}
  for listing in sorted(folder.glob(f'*-{prefix}*-packed-bundles-post-ra.txt')):
    if 'schedule-analysis' in listing.name:
      continue
    match = re.match(rf'(\d+-({prefix}\w*?)(?:\.\d+)?)-\d+-', listing.name)
    if match is None:
      continue
    every, once = _count(listing.read_text())
    pattern = f'{match[1]}-*-pre-delay_hlo-static-per-bundle-utilization.txt'
    [table] = folder.glob(pattern)
    use, capacity = _utilization(table.read_text())
    spills = use['VLOAD:FILL'] + use['VSTORE:SPILL']
    mxu = use['MXU'] / capacity['MXU'] / (every + once)
    found[match[2]] = Schedule(every, once, spills, mxu)
  if not found:
    raise ValueError(
      f'expected schedules of kernels {prefix}* in {folder}, found '
      f'{len(list(folder.iterdir()))} other files'
    )
  return found


def _count(listing):
  """Return the bundles of each grid step, and those of one a head."""
  lines = [x for x in listing.splitlines() if _BUNDLE.match(x)]
  once, end = 0, 0
  for at, line in enumerate(lines):
    jump = _JUMP.search(line)
    if jump is None or at < end or int(jump[1]) <= at:
      continue
    body = lines[at + 1 : int(jump[1])]
    if not any('vmat' in x for x in body):
      once, end = once + len(body), int(jump[1])
  return len(lines) - once, once


def _utilization(table):
  """Return how often each unit is used, and how often it could be a bundle."""
  head, body = table.split('== UTILIZATION:\n')
  *_, names, capacity = head.strip().splitlines()
  names = [x.strip() for x in names.split(',')]
  rows = [
    list(map(int, x.split())) for x in body.splitlines() if x[:1].isdigit()
  ]
  sums = [sum(column) for column in zip(*rows, strict=True)]
  capacity = map(int, capacity.split())
  return (
    dict(zip(names, sums, strict=True)),
    dict(zip(names, capacity, strict=True)),
  )
