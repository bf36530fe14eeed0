"""Fit the mesh axes that a rule asks for onto the shape of a leaf."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import PartitionSpec

Entry = str | tuple[str, ...] | None

# Axes that say where a leaf is kept and not how it is computed with: before it
# is used its parts are gathered, so that any cut will do.
STORAGE = ('fsdp', 'data', 'seq')


@dataclasses.dataclass(frozen=True)
class Fit:
  """Say how a leaf is cut.

  Attributes:
    spec: what to cut it by.
    problems: why that is not what the rule asks for; empty if it is.
    ways: the most that the axis at fault could cut the leaf by; 0 for none.
  """

  spec: PartitionSpec
  problems: tuple[str, ...] = ()
  ways: int = 0


def fit(
  entries: Sequence[Entry], shape: Sequence[int], sizes: Mapping[str, int]
) -> Fit:
  """Fit a rule's entries onto the trailing axes of a shape.

  A storage axis that does not divide the axis it is meant for cuts another one
  that the rule covers, the longest that it divides. Of several storage axes
  meant for one axis some may be left out; none of them placed is a problem, as
  is any other axis that does not divide.

  Args:
    entries: mesh axes for each trailing axis of the leaf.
    shape: of the leaf.
    sizes: {mesh axis: size}; axes of size 1 count as nothing.
  """
  if len(entries) > len(shape):
    text = f'{len(entries)} entries {tuple(entries)} are too many'
    return Fit(PartitionSpec(), (text,))
  lead = len(shape) - len(entries)
  wanted = [((e,) if isinstance(e, str) else e or ()) for e in entries]
  problems = [
    f'the mesh has no axis {unknown}'
    for names in wanted
    if (unknown := [n for n in names if n not in sizes])
  ]
  cuts: list[list[str]] = [[] for _ in shape]
  left: list[tuple[int, str]] = []
  for axis, names in enumerate(wanted, start=lead):
    for name in (n for n in names if sizes.get(n, 1) > 1):
      if _divides(shape[axis], cuts[axis], name, sizes):
        cuts[axis].append(name)
      else:
        left.append((axis, name))
  ways = 0
  for axis, name in left:
    names = wanted[axis - lead]
    if name not in STORAGE:
      problems.append(_uneven(shape, axis, cuts[axis], name, sizes))
      continue
    other = _other(shape, range(lead, len(shape)), cuts, name, sizes)
    if other is not None:
      cuts[other].append(name)
    elif not any(n in STORAGE and n in cut for n in names for cut in cuts):
      text = _uneven(shape, axis, cuts[axis], name, sizes)
      problems.append(f'{text}, nor does another axis of it')
      best = max(
        math.gcd(n // _parts(cut, sizes), sizes[name])
        for n, cut in zip(shape[lead:], cuts[lead:], strict=True)
      )
      ways = min(ways or best, best)
  spec: list[Any] = [
    None if not cut else cut[0] if len(cut) == 1 else tuple(cut) for cut in cuts
  ]
  while spec and spec[-1] is None:
    spec.pop()
  return Fit(PartitionSpec(*spec), tuple(problems), ways)


def _other(shape, axes, cuts, name, sizes) -> int | None:
  """Return the axis with the longest parts that `name` divides, if any."""
  able = [a for a in axes if _divides(shape[a], cuts[a], name, sizes)]
  length = lambda a: shape[a] // _parts(cuts[a], sizes)  # noqa: E731
  return max(able, key=length, default=None)


def _uneven(shape, axis, cut, name, sizes) -> str:
  by = ' * '.join(f'{n}={sizes[n]}' for n in (*cut, name))
  return f'axis {axis} of {shape[axis]} does not divide by {by}'


def _divides(length, cut, name, sizes) -> bool:
  return length % (_parts(cut, sizes) * sizes[name]) == 0


def _parts(cut, sizes) -> int:
  return math.prod(sizes[n] for n in cut)
