"""Cluster the noise levels into intervals that cost the least.

ANT (arXiv:2306.00354, section 4) minimises the sum of the costs of K intervals
by dynamic programming; costs are how far apart the levels of an interval are in
time or in signal-to-noise ratio, or how little their gradients agree. All of it
is float64 numpy, of a run's set-up.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from scipy import special

from vfm_jax.ops import noise
from vfm_jax.ops.intervals import Intervals, between
from vfm_jax.ops.process import NOISE_LEVELS

# 'exact' finds the best partition. 'official' does what the published code
# does: it misses partitions whose j-th interval ends at position j - 1, takes a
# total of 0 for impossible, and lets each interval but the first begin with the
# last element of the one before.
Rule = Literal['exact', 'official']
_RULES = ('exact', 'official')


@dataclasses.dataclass(frozen=True, eq=False)
class Partition:
  """Hold what the search found for T positions in K intervals.

  Attributes:
    last: int64 [K - 1], the last position of each interval but the last one.
    cost: sum of the costs of the intervals.
    table: f64 [T, K], the least cost of positions 0 to i in j + 1 intervals;
      inf where there is none.
    rule: how it was searched.
  """

  last: np.ndarray
  cost: float
  table: np.ndarray
  rule: Rule

  def intervals(
    self, levels: Sequence[int] | np.ndarray | None = None
  ) -> Intervals:
    """Return the intervals of noise levels.

    Args:
      levels: the noise level of each position, ascending [T]; an edge is half
        way between two of them. None is all levels.

    Raises:
      ValueError: `levels` does not have T levels, or an interval is empty.
    """
    count = len(self.table)
    at = np.arange(NOISE_LEVELS) if levels is None else np.asarray(levels)
    if len(at) != count:
      raise ValueError(
        f'expected the noise level of each of {count} positions, found '
        f'{len(at)}; give `levels`'
      )
    if self.rule == 'official':
      edges = at[self.last]
    else:
      edges = (at[self.last] + at[self.last + 1] + 1) // 2
    return Intervals((0, *(int(e) for e in edges), NOISE_LEVELS))


def sequence_cost(values: np.ndarray) -> np.ndarray:
  """Return what each interval of a sequence costs, f64 [T, T].

  Entry (l, r) is the sum of |s_t - s_c| over t from l to r, both included; c is
  (l + r + 1) / 2, rounded half to even.

  Args:
    values: s, [T]: times, or logarithms of the signal-to-noise ratio.
  """
  s = np.asarray(values, np.float64)
  first, last = _ends(len(s))
  centre = np.rint((first + last + 1) / 2).astype(np.int64)
  return _sums(np.abs(s[None] - s[:, None]), centre, single=0.0)


def affinity_cost(affinity: np.ndarray) -> np.ndarray:
  """Return what each interval costs by the affinity of its levels, f64 [T, T].

  Entry (l, r) is minus the sum of the affinities of c = floor((l + r + 1) / 2)
  to l, ..., r, and -1 for a single level.

  Args:
    affinity: [T, T], such as cosines between gradients, `evals.affinity`.
  """
  first, last = _ends(len(affinity))
  negative = -np.asarray(affinity, np.float64)
  return _sums(negative, (first + last + 1) // 2, single=-1.0)


def cluster(cost: np.ndarray, count: int, rule: Rule = 'exact') -> Partition:
  """Return the partition of positions 0 to T - 1 of the least cost.

  Of equal ones it is that with the earliest cuts, from the last cut on.

  Args:
    cost: f64 [T, T] of the intervals from row to column, both included.
    count: number of intervals K.
    rule: 'exact', or 'official' for the numbers of the published code.

  Raises:
    ValueError: there are fewer positions than intervals, or no partition.
  """
  if rule not in _RULES:
    raise ValueError(f'expected a `rule` of {_RULES}, found {rule!r}')
  size = len(cost)
  if not 1 <= count <= size:
    raise ValueError(
      f'expected a `count` of intervals from 1 to {size}, the number of '
      f'positions, found {count}'
    )
  official = rule == 'official'
  table = np.full((size, count), np.inf)
  cuts = np.zeros((size, count), np.int64)
  table[:, 0] = cost[0]
  before, after = np.arange(size)[:, None], np.arange(size)
  for j in range(1, count):
    # Row i: the cut is after position i, and the rest is one interval.
    total = table[:-1, j - 1, None] + cost[1:]
    allowed = (before[:-1] < after) & (
      before[:-1] >= (j if official else j - 1)
    )
    if official:
      allowed &= total != 0
    total = np.where(allowed, total, np.inf)
    cuts[:, j] = total.argmin(axis=0)
    table[:, j] = total.min(axis=0)
  if not np.isfinite(table[-1, -1]):
    raise ValueError(
      f'found no {count} intervals of {size} positions by the rule {rule!r}; '
      "take fewer, or 'exact'"
    )
  last, end = [], size - 1
  for j in range(count - 1, 0, -1):
    end = cuts[end, j]
    last.append(end)
  return Partition(
    np.array(last[::-1], np.int64), float(table[-1, -1]), table, rule
  )


def by_time(count: int, *, rule: Rule = 'exact') -> Intervals:
  """Return intervals that are as short as can be: about equally long ones."""
  cost = sequence_cost(np.arange(NOISE_LEVELS))
  return cluster(cost, count, rule).intervals()


def by_log_snr(
  count: int,
  *,
  schedule: Callable[..., np.ndarray] = noise.linear,
  rule: Rule = 'exact',
) -> Intervals:
  """Return intervals of levels that are close in log-SNR.

  Args:
    count: number of intervals K.
    schedule: number of steps -> beta, see `ops.noise`.
    rule: see `cluster`.
  """
  return cluster(sequence_cost(log_snr(schedule)), count, rule).intervals()


def by_snr(
  count: int,
  *,
  schedule: Callable[..., np.ndarray] = noise.linear,
  rule: Rule = 'exact',
) -> Intervals:
  """Return intervals of levels that are close in SNR, as `by_log_snr` else.

  The SNR of the first levels is so large that nearly all levels end up in one
  interval; the logarithm is what to take.
  """
  values = np.exp(log_snr(schedule))
  return cluster(sequence_cost(values), count, rule).intervals()


def by_density(
  count: int,
  *,
  mean: float = -1.2,
  scale: float = 1.2,
  schedule: Callable[..., np.ndarray] | None = None,
) -> Intervals:
  """Return intervals that are equally likely where ln sigma is normal.

  sigma is that of the noise over a signal of 1, drawn in training from the
  density of EDM (arXiv:2206.00364, table 1): the edges are its quantiles. The
  curriculum (arXiv:2403.10348) has such clusters for continuous noise, as we
  read it. For times of `interpolants.logit_normal(mean, scale)` on a linear
  path ln sigma has the mean -mean. Equally likely levels want
  `intervals.uniform`.

  Args:
    count: number of intervals K.
    mean: of ln sigma.
    scale: its standard deviation.
    schedule: of a discrete diffusion, number of steps -> beta; None is the
      linear path of an `Interpolant`.

  Raises:
    ValueError: an interval is so short that it has no level.
  """
  if schedule is None:
    part = np.arange(NOISE_LEVELS) / (NOISE_LEVELS - 1)
  else:
    part = special.expit(-log_snr(schedule) / 2)
  z = special.ndtri(np.arange(1, count) / count)
  # sigma / (1 + sigma), which is finite.
  return between(np.searchsorted(part, special.expit(mean + scale * z)))


def by_affinity(path: str, count: int, *, rule: Rule = 'exact') -> Intervals:
  """Return intervals of levels whose gradients agree.

  Args:
    path: an .npz file with `levels` [T] and `affinity` [T, T], as
      `evals.affinity.TaskAffinity` writes it.
    count: number of intervals K.
    rule: see `cluster`.
  """
  with np.load(path, allow_pickle=False) as file:
    levels, affinity = file['levels'], file['affinity']
  return cluster(affinity_cost(affinity), count, rule).intervals(levels)


def log_snr(schedule: Callable[..., np.ndarray] = noise.linear) -> np.ndarray:
  """Return log(abar / (1 - abar)) of each noise level, f64 [NOISE_LEVELS]."""
  abar = noise.tables(schedule(NOISE_LEVELS)).abar
  return np.log(abar) - np.log1p(-abar)


def _ends(size: int) -> tuple[np.ndarray, np.ndarray]:
  position = np.arange(size)
  return position[:, None], position[None]


def _sums(
  terms: np.ndarray, centre: np.ndarray, *, single: float
) -> np.ndarray:
  """Return sums over l..r of row centre[l, r] of `terms`, f64 [T, T].

  Entries below the diagonal mean nothing.
  """
  size = len(terms)
  first, last = _ends(size)
  centre = np.minimum(centre, size - 1)
  ahead = np.pad(np.cumsum(terms, axis=1), ((0, 0), (1, 0)))
  out = ahead[centre, last + 1] - ahead[centre, first]
  return np.where(first == last, single, out)
