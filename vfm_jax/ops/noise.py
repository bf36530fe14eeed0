"""Noise schedules of discrete diffusion, tables, respacing, loss weights.

A schedule is a function of the number of steps T that returns the variances
beta float64 [T] that each step adds, from the cleanest to the noisiest. A loss
weight is a function (snr [B], predicts) -> [B] of the signal-to-noise ratio
abar / (1 - abar) and of what the network predicts ('eps', 'x0' or 'v').
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def linear(steps: int) -> np.ndarray:
  """Return beta from 1e-4 to 0.02 (DDPM, arXiv:2006.11239), times 1000 / T.

  The factor keeps the noise at the last step the same for other T.
  """
  scale = 1000 / steps
  return raw_linear(steps, start=scale * 1e-4, end=scale * 0.02)


def cosine(steps: int, *, offset: float = 0.008, cap: float = 0.999):
  """Return beta float64 [T] of the squared cosine (arXiv:2102.09672, eq. 17).

  abar(u) = cos^2((u + offset) / (1 + offset) pi / 2) up to a constant, for u
  from 0 to 1; beta is at most `cap`.
  """

  def abar(u: float) -> float:
    return math.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2

  return np.array(
    [
      min(1 - abar((i + 1) / steps) / abar(i / steps), cap)
      for i in range(steps)
    ],
    np.float64,
  )


def raw_linear(
  steps: int, *, start: float = 1e-4, end: float = 0.02
) -> np.ndarray:
  """Return beta evenly spaced from `start` to `end`, both included."""
  return np.linspace(start, end, steps, dtype=np.float64)


def quadratic(
  steps: int, *, start: float = 1e-4, end: float = 0.02
) -> np.ndarray:
  """Return beta whose square root is evenly spaced."""
  return np.linspace(start**0.5, end**0.5, steps, dtype=np.float64) ** 2


def warmup(
  steps: int, *, start: float = 1e-4, end: float = 0.02, share: float = 0.1
) -> np.ndarray:
  """Return beta that rises linearly over a share of the steps, then stays."""
  beta = constant(steps, end=end)
  rise = int(steps * share)
  beta[:rise] = np.linspace(start, end, rise, dtype=np.float64)
  return beta


def constant(steps: int, *, end: float = 0.02) -> np.ndarray:
  """Return the same beta at each step."""
  return np.full(steps, end, np.float64)


def harmonic(steps: int) -> np.ndarray:
  """Return beta 1/T, 1/(T-1), ..., 1, under which abar falls linearly."""
  return 1.0 / np.linspace(steps, 1, steps, dtype=np.float64)


class Tables(NamedTuple):
  """Hold what depends on the step alone; all float64 [T].

  Attributes:
    beta: variance that a step adds.
    abar: product of 1 - beta up to and with the step; `abar_prev` and
      `abar_next` are its shifts, with 1 before the first and 0 after the last.
    post_var: variance of q(x_{t-1} | x_t, x0).
    post_logvar: its logarithm, with the entry of step 1 at step 0 (log 0).
    post_x0: weight of x0 in the mean of that posterior.
    post_xt: weight of x_t in it.
  """

  beta: np.ndarray
  abar: np.ndarray
  abar_prev: np.ndarray
  abar_next: np.ndarray
  post_var: np.ndarray
  post_logvar: np.ndarray
  post_x0: np.ndarray
  post_xt: np.ndarray


def tables(beta: np.ndarray) -> Tables:
  """Return the tables of a schedule."""
  abar = np.cumprod(1.0 - beta)
  prev, following = np.append(1.0, abar[:-1]), np.append(abar[1:], 0.0)
  post_var = beta * (1.0 - prev) / (1.0 - abar)
  second = post_var[1] if len(beta) > 1 else beta[0]
  return Tables(
    beta=beta,
    abar=abar,
    abar_prev=prev,
    abar_next=following,
    post_var=post_var,
    post_logvar=np.log(np.append(second, post_var[1:])),
    post_x0=beta * np.sqrt(prev) / (1.0 - abar),
    post_xt=(1.0 - prev) * np.sqrt(1.0 - beta) / (1.0 - abar),
  )


def respacing(steps: int, spec: str) -> np.ndarray:
  """Return which of `steps` steps to keep, int64, ascending.

  Args:
    steps: number of steps T of the process.
    spec: '' keeps all; 'ddimN' takes the smallest stride from step 0 that
      gives exactly N; 'N' spreads N over all, first and last included;
      'N,M,...' cuts the steps into equal sections and spreads N over the
      first, M over the second and so on.

  Raises:
    ValueError: the spec cannot be met.
  """
  if not spec:
    return np.arange(steps)
  if spec.startswith('ddim'):
    count = _count(spec.removeprefix('ddim'), spec)
    for stride in range(1, steps + 1):
      if len(range(0, steps, stride)) == count:
        return np.arange(0, steps, stride)
    raise ValueError(
      f'no stride over {steps} steps keeps exactly {count}; change the '
      f'sampling steps {spec!r}, for example to {str(count)!r}'
    )
  counts = [_count(part, spec) for part in spec.split(',')]
  size, longer = divmod(steps, len(counts))
  kept, start = [], 0
  for i, count in enumerate(counts):
    length = size + (i < longer)
    if count > length:
      raise ValueError(
        f'cannot keep {count} of the {length} steps of section {i}; change '
        f'the sampling steps {spec!r}'
      )
    stride = (length - 1) / (count - 1) if count > 1 else 1.0
    # Summed in floating point and rounded half to even: which steps are kept
    # depends on both.
    position = 0.0
    for _ in range(count):
      kept.append(start + round(position))
      position += stride
    start += length
  return np.array(sorted(set(kept)))


def _count(text: str, spec: str) -> int:
  if not text.strip().isdigit() or int(text) < 1:
    raise ValueError(
      "expected sampling steps such as '', '250', '10,15,20' or 'ddim50', "
      f'found {spec!r}'
    )
  return int(text)


def unit_weight(snr: jax.Array, predicts: str) -> jax.Array:
  """Weigh all noise levels alike."""
  del predicts
  return jnp.ones_like(snr)


def min_snr(snr: jax.Array, predicts: str, *, gamma: float = 5.0) -> jax.Array:
  """Cap the weight of clean levels (Min-SNR, arXiv:2303.09556, section 3.4).

  min(SNR, gamma) on the error of x0, so over SNR for the error of eps and over
  SNR + 1 for that of v.
  """
  capped = jnp.minimum(snr, gamma)
  return {'eps': capped / snr, 'x0': capped, 'v': capped / (snr + 1)}[predicts]


def p2(
  snr: jax.Array, predicts: str, *, gamma: float = 1.0, k: float = 1.0
) -> jax.Array:
  """Weigh clean levels down (P2, arXiv:2204.00227, eq. 8): 1/(k + SNR)^gamma.

  Stated for the error of eps, and applied unchanged to the others.
  """
  del predicts
  return (k + snr) ** -gamma
