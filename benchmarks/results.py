"""Hold measured times, and print them as ratios."""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Ratio:
  """Summarise per-round ratios: their median and quartiles."""

  median: float
  low: float
  high: float


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Hold the times of several contestants over the same rounds.

  Attributes:
    title: what one unit of work is.
    reference: the contestant that the others are divided by.
    seconds: seconds a unit of work, one entry a round, by contestant.
    bars: largest ratio that is accepted, by contestant.
    notes: conditions of the measurement, for the reader of the table.
    info: what the contestants said about themselves.
    unit: 'ms', or what else `seconds` counts, as 'cycles'.
  """

  title: str
  reference: str
  seconds: Mapping[str, Sequence[float]]
  bars: Mapping[str, float] = dataclasses.field(default_factory=dict)
  notes: str = ''
  info: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  unit: str = 'ms'

  def __post_init__(self):
    if self.reference not in self.seconds:
      raise ValueError(
        f'the reference {self.reference!r} of {self.title!r} was not measured; '
        f'there is {sorted(self.seconds)}'
      )
    rounds = {name: len(times) for name, times in self.seconds.items()}
    if len(set(rounds.values())) != 1 or not rounds[self.reference]:
      raise ValueError(
        f'{self.title!r} needs the same number of rounds, at least 1, of '
        f'every contestant, found {rounds}'
      )

  def ratio(self, name: str) -> Ratio:
    """Return the time of a contestant over the reference's.

    Times are divided within each round, so that a drift of the machine that
    is slower than a round cancels.
    """
    pairs = zip(self.seconds[name], self.seconds[self.reference], strict=True)
    ratios = [time / reference for time, reference in pairs]
    if len(ratios) == 1:
      return Ratio(ratios[0], ratios[0], ratios[0])
    low, median, high = statistics.quantiles(ratios, n=4, method='inclusive')
    return Ratio(median, low, high)

  def missed(self) -> list[str]:
    """Return the contestants that are slower than their bar."""
    return [n for n, bar in self.bars.items() if self.ratio(n).median > bar]


@dataclasses.dataclass(frozen=True)
class Rates:
  """Hold what several contestants reach, without a reference.

  Attributes:
    title: what is measured, or estimated.
    unit: of the values; more is better.
    values: one entry a round, by contestant.
    notes: conditions, for the reader of the table.
    info: more of the same, for JSON.
  """

  title: str
  unit: str
  values: Mapping[str, Sequence[float]]
  notes: str = ''
  info: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def missed(self) -> list[str]:
    """Return none: there are no bars."""
    return []


Result = Comparison | Rates


def table(found: Sequence[Result]) -> str:
  """Return one markdown table of comparisons and one of rates."""
  comparisons = [r for r in found if isinstance(r, Comparison)]
  rates = [r for r in found if isinstance(r, Rates)]
  parts = [_ratios(comparisons)] if comparisons else []
  parts += [_rates(rates)] if rates else []
  return '\n'.join(parts)


def _rates(rates: Sequence[Rates]) -> str:
  lines = ['| work | contestant | | quartiles |', '|---|---|---|---|']
  for r in rates:
    for name, values in r.values.items():
      middle, spread = statistics.median(values), ''
      if len(values) > 1:
        cuts = statistics.quantiles(values, n=4, method='inclusive')
        spread = f'{cuts[0]:.4g}–{cuts[2]:.4g}'
      shown = f'{middle:.4g} {r.unit}'
      lines.append(f'| {r.title} | {name} | {shown} | {spread} |')
  lines.append('')
  for r in rates:
    lines += [f'{r.title}: {r.notes}'.rstrip(), '']
  return '\n'.join(lines)


def _ratios(comparisons: Sequence[Comparison]) -> str:
  """Return a table of time ratios; lower is better."""
  lines = [
    '| work | contestant | ms | time over reference | quartiles | bar |',
    '|---|---|---|---|---|---|',
  ]
  for c in comparisons:
    for name, times in c.seconds.items():
      middle = statistics.median(times)
      cost = f'{1000 * middle:.4g}'
      if c.unit != 'ms':
        cost = f'{middle:,.0f} {c.unit}'
      ratio = c.ratio(name)
      bar = ''
      if name in c.bars:
        met = 'met' if name not in c.missed() else 'MISSED'
        bar = f'≤ {c.bars[name]:g} {met}'
      if name == c.reference:
        shown, spread = '1 (reference)', ''
      else:
        shown = f'{ratio.median:.3f}'
        spread = f'{ratio.low:.3f}–{ratio.high:.3f}'
      lines.append(
        f'| {c.title} | {name} | {cost} | {shown} | {spread} | {bar} |'
      )
  lines.append('')
  for c in comparisons:
    rounds = len(c.seconds[c.reference])
    times = f'{rounds} interleaved rounds. ' if c.unit == 'ms' else ''
    lines.append(f'{c.title}: {times}{c.notes}'.rstrip())
    lines.append('')
  return '\n'.join(lines)


def write(path: pathlib.Path, found: Sequence[Result]) -> None:
  """Write all times, ratios and rates as JSON."""
  entries = []
  for r in found:
    entry = dataclasses.asdict(r)
    if isinstance(r, Comparison):
      entry['ratios'] = {n: dataclasses.asdict(r.ratio(n)) for n in r.seconds}
    entries.append(entry)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(entries, indent=1, ensure_ascii=False) + '\n')
