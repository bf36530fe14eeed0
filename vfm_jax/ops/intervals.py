"""Cut the noise levels into intervals: the tasks of a denoiser.

Several methods treat ranges of noise levels as tasks, stages or experts:
ANT (arXiv:2306.00354), the denoising curriculum (arXiv:2403.10348) and MEME
(arXiv:2306.04990).
"""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vfm_jax.ops.process import NOISE_LEVELS


@dataclasses.dataclass(frozen=True)
class Intervals:
  """Partition the noise levels 0 (clean) to NOISE_LEVELS - 1.

  Interval i holds the levels bounds[i] <= level < bounds[i + 1].

  Attributes:
    bounds: the K + 1 ascending ends, from 0 to NOISE_LEVELS.
  """

  bounds: tuple[int, ...]

  def __post_init__(self):
    """Refuse what is no partition."""
    b = self.bounds
    ascending = all(low < high for low, high in itertools.pairwise(b))
    if len(b) < 2 or b[0] != 0 or b[-1] != NOISE_LEVELS or not ascending:
      raise ValueError(
        f'expected `bounds` that ascend from 0 to {NOISE_LEVELS}, without an '
        f'empty interval, found {b}'
      )

  @property
  def count(self) -> int:
    """Return the number of intervals K."""
    return len(self.bounds) - 1

  def of(self, level: jax.Array) -> jax.Array:
    """Return the interval int32 of each noise level int32, of any shape."""
    inner = jnp.asarray(self.bounds[1:-1], jnp.int32)
    return jnp.searchsorted(inner, level, side='right').astype(jnp.int32)

  def range_of(self, interval: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the first level and the one after the last of each interval."""
    bounds = jnp.asarray(self.bounds, jnp.int32)
    return bounds[interval], bounds[interval + 1]


def uniform(count: int) -> Intervals:
  """Return `count` intervals of equal length, rounded down to whole levels."""
  return Intervals(tuple(i * NOISE_LEVELS // count for i in range(count + 1)))


def between(edges: Sequence[int]) -> Intervals:
  """Return the intervals between inner edges, such as a clustering found."""
  return Intervals((0, *(int(e) for e in np.sort(edges)), NOISE_LEVELS))
