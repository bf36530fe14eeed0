"""Define what a noising process offers to the objective and the samplers.

A process mixes a clean sample x0 with noise eps at a time t into x_t, scores
what a network says about x_t, and reads that output as a clean sample, a
noise, and what else follows from it. Discrete Gaussian diffusion counts t in
steps, 0 the cleanest; interpolants count from 0 noise to 1 data. Nothing
outside a process may know which: what must (experts, masks, curricula by noise
level) asks `noise_index`.
"""

from collections.abc import Iterable
from typing import NamedTuple, Protocol, runtime_checkable

import jax

# Noise levels that `noise_index` tells apart, whatever the process.
NOISE_LEVELS = 1000


class Prediction(NamedTuple):
  """Hold what the output of a network says about x_t; all f32 [B, ...].

  Attributes:
    x0: the clean sample.
    eps: the noise.
    mean: mean of the sample one step less noisy, where steps are discrete.
    logvar: logarithm of its variance, of the shape of `x0` or broadcast to it.
    v: the velocity of the process, as the process defines it.
    score: gradient of the log-density of x_t.
  """

  x0: jax.Array
  eps: jax.Array
  mean: jax.Array | None = None
  logvar: jax.Array | None = None
  v: jax.Array | None = None
  score: jax.Array | None = None


@runtime_checkable
class Process(Protocol):
  """What `objectives.denoise` asks of a process; samplers may ask for more.

  Frozen dataclasses satisfy it. `t` is [B], int32 or float32 as the process
  chooses; x0, eps and x_t are f32 [B, ..., C]; `output` is [B, ..., C_out] with
  C_out = C or, where the network also predicts a variance, 2C. All algebra is
  in float32.
  """

  def draw_time(self, keys: jax.Array) -> jax.Array:
    """Return a time [B] for each key [B], as in training."""
    ...

  def draw_within(
    self, keys: jax.Array, low: jax.Array, high: jax.Array
  ) -> jax.Array:
    """Return a time [B] a key as in training, of some noise levels alone.

    The density of training is cut to the times whose `noise_index` is in
    `low <= level < high`, int32 [B] each. From 0 to NOISE_LEVELS it gives what
    `draw_time` does, bit for bit. Where a process has no such time, what comes
    is near the range and outside it; see `check_reachable`.
    """
    ...

  def has_time_within(self, low: int, high: int) -> bool:
    """Return whether a time of training has a noise level in a range."""
    ...

  def model_time(self, t: jax.Array) -> jax.Array:
    """Return f32 [B], the number that the network embeds for t."""
    ...

  def noise_index(self, t: jax.Array) -> jax.Array:
    """Return int32 [B], the noise level from 0 (clean) to NOISE_LEVELS - 1."""
    ...

  def corrupt(self, x0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
    """Return x_t."""
    ...

  def loss(
    self,
    output: jax.Array,
    x0: jax.Array,
    eps: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the loss f32 [B] of each example and its parts, each f32 [B]."""
    ...

  def predict(
    self, output: jax.Array, x_t: jax.Array, t: jax.Array
  ) -> Prediction:
    """Read the output of the network."""
    ...


def check_reachable(
  process: Process, ranges: Iterable[tuple[int, int]], path: str
) -> None:
  """Refuse ranges of noise levels in which a process has no times.

  Args:
    process: what the times are drawn from.
    ranges: first level and the one after the last, of each.
    path: where the config sets them, for the error.

  Raises:
    ValueError: names the empty ones.
  """
  if empty := [r for r in ranges if not process.has_time_within(*r)]:
    raise ValueError(
      f'expected times of `objective.process` in each part of `{path}`, found '
      f'none in the noise levels {empty} (first, one after the last) of '
      f'{NOISE_LEVELS}; take larger parts, or give the process more steps'
    )


def bcast(coefficient: jax.Array, x: jax.Array) -> jax.Array:
  """Return a coefficient [B] as [B, 1, ...], to multiply x [B, ...].

  More leading axes do as well: [S, B] for x [S, B, ...].
  """
  ones = (1,) * (x.ndim - coefficient.ndim)
  return coefficient.reshape(coefficient.shape + ones)
