"""Schedules of learning rate and weight decay, as functions of the step.

Every schedule is `f(step, total_steps, *, ...)`. A Python or NumPy step gives
float64; a JAX step gives a float32 tracer, so that one definition serves the
compiled step, the plots and the recorded tables. `step` counts finished steps
from 0; steps past the end hold the value of the end, unless a schedule is told
to `extend`.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Step = Any  # int, NumPy integers or a JAX array
Value = Any  # float64 of NumPy or float32 of JAX, in the shape of the step

# What comes after the last step: the value of the end, or the formula as it
# goes on, by which a cosine comes back and a line passes 0 (V-JEPA's code).
PastEnd = Literal['hold', 'extend']


def open_ramp(step: Step, warmup: int) -> Value:
  """Return step / warmup: 0 first, the peak on the first step after it."""
  return _real(step) / warmup


def closed_ramp(step: Step, warmup: int) -> Value:
  """Return step / (warmup - 1): the peak is the last step of the warm-up too.

  This is the table of VideoMAE's official code: the peak appears twice.
  """
  return _real(step) / max(warmup - 1, 1)


def early_ramp(step: Step, warmup: int) -> Value:
  """Return (step + 1) / warmup: no step with a rate of 0."""
  return (_real(step) + 1.0) / warmup


def constant(step: Step, total_steps: int, *, value: float = 1.0) -> Value:
  """Return `value` at every step."""
  del total_steps
  return _real(step) * 0.0 + value


def linear(
  step: Step,
  total_steps: int,
  *,
  peak: float,
  final: float = 0.0,
  start: float = 0.0,
  warmup_steps: int = 0,
  warmup_fraction: float = 0.0,
  ramp: Callable = open_ramp,
  past_end: PastEnd = 'hold',
) -> Value:
  """Warm up linearly to `peak`, then go linearly to `final`."""
  w = _warmup(total_steps, warmup_steps, warmup_fraction)
  u = _progress(step, w, total_steps, past_end)
  return _join(step, w, ramp, start, peak, peak + (final - peak) * u)


def warmup_cosine(
  step: Step,
  total_steps: int,
  *,
  peak: float,
  final: float = 0.0,
  start: float = 0.0,
  warmup_steps: int = 0,
  warmup_fraction: float = 0.0,
  ramp: Callable = open_ramp,
  past_end: PastEnd = 'hold',
) -> Value:
  """Warm up linearly to `peak`, then follow half a cosine towards `final`.

  After W warm-up steps of S: final + (peak - final) / 2 * (1 + cos(pi * u)),
  u = (step - W) / (S - W) (SGDR, arXiv:1608.03983). The last step of a
  run, S - 1, does not quite reach `final`.

  Args:
    step: number of finished steps.
    total_steps: length of the run, S.
    peak: value at the end of the warm-up.
    final: value at step S.
    start: value that the warm-up starts from.
    warmup_steps: length of the warm-up; or give
    warmup_fraction: the same as a fraction of the run.
    ramp: (step, warmup) -> fraction of the way from `start` to `peak`.
    past_end: see `PastEnd`.
  """
  w = _warmup(total_steps, warmup_steps, warmup_fraction)
  u = _progress(step, w, total_steps, past_end)
  cosine = 0.5 * (1.0 + _xp(step).cos(math.pi * u))
  return _join(step, w, ramp, start, peak, final + (peak - final) * cosine)


def rsqrt(
  step: Step,
  total_steps: int,
  *,
  peak: float,
  timescale: int = 10_000,
  start: float = 0.0,
  warmup_steps: int = 0,
  warmup_fraction: float = 0.0,
  cooldown_steps: int = 0,
  ramp: Callable = open_ramp,
) -> Value:
  """Decay as 1 / sqrt of the step, then cool down linearly to 0.

  After the warm-up: peak * sqrt(timescale / (timescale + step - W))
  (Scaling Vision Transformers, arXiv:2106.04560).
  """
  w = _warmup(total_steps, warmup_steps, warmup_fraction)
  xp, s = _xp(step), _real(step)
  decay = peak * xp.sqrt(timescale / (timescale + xp.maximum(s - w, 0.0)))
  value = _join(step, w, ramp, start, peak, decay)
  left = (total_steps - s) / max(cooldown_steps, 1)
  return value * xp.clip(left, 0.0, 1.0) if cooldown_steps else value


def warmup_stable_decay(
  step: Step,
  total_steps: int,
  *,
  peak: float,
  final: float = 0.0,
  start: float = 0.0,
  warmup_steps: int = 0,
  warmup_fraction: float = 0.0,
  decay_steps: int = 0,
  decay_fraction: float = 0.0,
  ramp: Callable = open_ramp,
  past_end: PastEnd = 'hold',
) -> Value:
  """Warm up, hold `peak`, then go linearly to `final` over the last steps.

  MiniCPM, arXiv:2404.06395, with a linear last phase.
  """
  w = _warmup(total_steps, warmup_steps, warmup_fraction)
  d = _warmup(total_steps, decay_steps, decay_fraction, 'decay')
  u = _progress(step, total_steps - d, total_steps, past_end)
  return _join(step, w, ramp, start, peak, peak + (final - peak) * u)


def stretched(
  step: Step,
  total_steps: int,
  *,
  schedule: Callable,
  scale: float = 1.0,
  ahead: int = 0,
) -> Value:
  """Follow a schedule that is longer than the run, or some steps ahead of it.

  V-JEPA's run (arXiv:2404.08471) ends after 4/5 of its schedules, `scale` 1.25,
  and its first step takes the value of step 1, `ahead` 1.

  Args:
    step: number of finished steps.
    total_steps: length of the run.
    schedule: the longer one.
    scale: its length over that of the run.
    ahead: steps to look ahead.
  """
  return schedule(step + ahead, int(total_steps * scale))


def _join(step, warmup, ramp, start, peak, after) -> Value:
  if not warmup:
    return after
  before = start + (peak - start) * ramp(step, warmup)
  return _xp(step).where(_real(step) < warmup, before, after)[()]


def _progress(step, begin: int, end: int, past_end: PastEnd = 'hold') -> Value:
  """Return how far the step is from `begin` (0) to `end` (1)."""
  u = (_real(step) - begin) / max(end - begin, 1)
  return _xp(step).clip(u, 0.0, 1.0 if past_end == 'hold' else None)


def _warmup(total: int, steps: int, fraction: float, name='warmup') -> int:
  if steps and fraction:
    raise ValueError(
      f'give {name}_steps or {name}_fraction, not both '
      f'(found {steps} and {fraction}); see config.optim'
    )
  n = steps or round(fraction * total)
  if not 0 <= n <= total:
    raise ValueError(
      f'{name} of {n} steps does not fit into {total} steps; '
      f'change {name}_steps or {name}_fraction in config.optim'
    )
  return n


def _xp(step: Step) -> Any:
  return jnp if isinstance(step, jax.Array) else np


def _real(step: Step) -> Value:
  if isinstance(step, jax.Array):
    return step.astype(jnp.float32)
  return np.asarray(step, np.float64)[()]
