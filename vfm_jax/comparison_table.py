"""Lay out the table of a comparison."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple, get_args

from vfm_jax.comparison import Arm, Comparison, Outcome, State
from vfm_jax.evals.convergence import Curves


class Result(NamedTuple):
  """Hold what came of an arm.

  Attributes:
    arm: the arm.
    before: steps of the runs that it goes on from.
    outcomes: one a seed.
    by_seed: losses by noise level over the training, one a seed, or None.
  """

  arm: Arm
  before: int
  outcomes: Sequence[Outcome]
  by_seed: Sequence[Curves | None]

  @property
  def curves(self) -> list[Curves]:
    """Return the losses of the runs that have any."""
    return [c for c in self.by_seed if c is not None]

  @property
  def done(self) -> list[Curves | None]:
    """Return the losses by seed, None where they end before the run does."""
    last = self.outcomes[0].steps
    return [c if c and c.steps[-1] == last else None for c in self.by_seed]

  def final_losses(self) -> list[float]:
    """Return the last held-out loss of the runs that are done."""
    return [float(c.losses[-1].mean()) for c in self.done if c is not None]

  def measured(self, name: str) -> list[float]:
    """Return a measure of the runs that are done."""
    return [o.measured[name] for o in self.outcomes if name in o.measured]


def table(
  comparison: Comparison, results: Sequence[Result], seeds: Sequence[int]
) -> str:
  """Return the Markdown table, what the arms are, and what was run.

  Its columns are the measures that planes show, or all where there is no plane.
  """
  names = sorted({n for r in results for o in r.outcomes for n in o.measured})
  # What is the same in all runs, such as the accuracy of the classifier, is no
  # column.
  values = {n: [v for r in results for v in r.measured(n)] for n in names}
  common = {n: v[0] for n, v in values.items() if len(v) > 1 == len(set(v))}
  drawn = {n for pair in (comparison.planes or {}).values() for n in pair}
  columns = [n for n in names if n not in common and (n in drawn or not drawn)]
  denoise = comparison.levels is not None
  head = ['arm', 'parameters', 'trained', 'steps']
  head += ['held-out loss'] * denoise
  rows = [[*head, *(f'`{n}`' for n in columns), 'runs']]
  for r in results:
    first = r.outcomes[0]
    before = f'{r.before:,} + ' if r.before else ''
    rows.append(
      [
        r.arm.name,
        f'{first.parameters:,}',
        f'{first.trained:,}',
        f'{before}{first.steps:,}',
        *[spread(r.final_losses())] * denoise,
        *(spread(r.measured(n)) for n in columns),
        ended(r.outcomes),
      ]
    )
  parts = [f'# {comparison.title}', comparison.about, markdown(rows)]
  minutes = sum(o.seconds for r in results for o in r.outcomes) / 60
  same = ''.join(f' In all runs `{n}` is {v:.3f}.' for n, v in common.items())
  over = (
    'Mean ± sample standard deviation over the seeds'
    if len(seeds) > 1
    else 'One value, of the seed'
  )
  parts.append(
    f'{over} {", ".join(map(str, seeds))}; the runs took '
    f'{minutes:.1f} minutes together, interruptions left out.{same}'
  )
  parts.append(
    '\n'.join(
      f'- **{r.arm.name}**: {r.arm.note}' for r in results if r.arm.note
    )
  )
  errors = [
    f'- {r.arm.name}, seed {seed}: {o.state}. {o.message}'
    for r in results
    for seed, o in zip(seeds, r.outcomes, strict=True)
    if o.state != 'done'
  ]
  if errors:
    parts.append('Not done:\n\n' + '\n'.join(errors))
  return '\n\n'.join(p for p in parts if p) + '\n'


def markdown(rows: Sequence[Sequence[str]]) -> str:
  """Return a table of rows, the first one its head."""
  lines = ['| ' + ' | '.join(row) + ' |' for row in rows]
  lines.insert(1, '|---' * len(rows[0]) + '|')
  return '\n'.join(lines)


def ended(outcomes: Sequence[Outcome]) -> str:
  """Return how many runs ended how."""
  counts = {s: sum(o.state == s for o in outcomes) for s in get_args(State)}
  return ', '.join(f'{n} {state}' for state, n in counts.items() if n)


def spread(values: Sequence[float]) -> str:
  """Return mean and sample standard deviation as text."""
  if not values:
    return 'none'
  mean = statistics.fmean(values)
  digits = 0 if abs(mean) >= 100 else 3 if abs(mean) >= 0.1 else 4
  if len(values) == 1:
    return f'{mean:.{digits}f}'
  return f'{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}'
