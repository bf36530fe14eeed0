"""Train on and read interpolants between noise and data (SiT, flow matching).

Time runs from 0, noise, to 1, data, see `ops.paths`: the other way than the
steps of discrete diffusion. Sources: SiT, arXiv:2401.08740; rectified flow,
arXiv:2209.03003 and arXiv:2403.03206.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vfm_jax.ops import likelihood, noise, paths, truncated
from vfm_jax.ops import process as base
from vfm_jax.ops.paths import Form, Path
from vfm_jax.ops.process import bcast

Quantity = Literal['velocity', 'noise', 'score']

# Floats of slack at the ends of a range of noise levels, so that a compiled
# `index` that rounds otherwise stays in it.
_SLACK = 8


def interval(
  path: Path,
  prediction: Quantity,
  eps: float,
  *,
  sde: bool = False,
  form: Form = 'sigma',
  last_step_size: float = 0.0,
) -> tuple[float, float]:
  """Return the times (t0, t1) between which everything stays finite.

  Args:
    path: the interpolant.
    prediction: what the network predicts.
    eps: how far to stay from an end where something divides by zero.
    sde: whether an SDE is solved: it needs the score as well.
    form: its diffusion.
    last_step_size: length of the last step of the SDE, which starts at t1.
  """
  t0, t1 = 0.0, 1.0
  if sde or prediction != 'velocity' or not path.from_pure_noise:
    t1 = 1.0 - (last_step_size if sde and last_step_size else eps)
  starts_late = prediction != 'velocity' or (sde and form == 'sbdm')
  if path.from_pure_noise and starts_late:
    t0 = eps
  return t0, t1


class Ends(NamedTuple):
  """Say between which numbers to draw, f32 [B] each."""

  low: jax.Array
  high: jax.Array


def uniform(keys: jax.Array, *, within: Ends | None = None) -> jax.Array:
  """Draw u ~ U[0, 1), f32 [B], one key each.

  Args:
    keys: one a number [B].
    within: the part of [0, 1] to draw from; None is all.
  """
  u = jax.vmap(jax.random.uniform)(keys)
  return u if within is None else truncated.uniform(u, *within)


def logit_normal(
  keys: jax.Array,
  *,
  mean: float = 0.0,
  scale: float = 1.0,
  within: Ends | None = None,
) -> jax.Array:
  """Draw the sigmoid of a normal number, f32 [B] (arXiv:2403.03206, eq. 19).

  Args:
    keys: one a number [B].
    mean: of the normal number.
    scale: its standard deviation.
    within: as in `uniform`: the same density, between the ends alone.
  """
  z = jax.vmap(jax.random.normal)(keys)
  if within is not None:
    ends = ((jax.scipy.special.logit(u) - mean) / scale for u in within)
    z = truncated.normal(z, *ends)
  return jax.nn.sigmoid(mean + scale * z)


def linear_index(path: Path, t: jax.Array) -> jax.Array:
  """Return the noise level round((1 - t) (L - 1)), int32 [B]."""
  del path
  last = base.NOISE_LEVELS - 1
  return jnp.clip(jnp.round((1.0 - t) * last), 0, last).astype(jnp.int32)


def snr_index(
  path: Path,
  t: jax.Array,
  *,
  schedule: Callable[[int], np.ndarray] = noise.linear,
) -> jax.Array:
  """Return the step of a discrete diffusion closest in log-SNR, int32 [B].

  Args:
    path: the interpolant.
    t: f32 [B].
    schedule: number of steps -> beta, see `ops.noise`.
  """
  abar = noise.tables(schedule(base.NOISE_LEVELS)).abar
  log_snr = np.log(abar) - np.log1p(-abar)
  # The table falls with the step and searchsorted wants it to rise. The
  # infinities at the ends of a path fall into the last and the first step.
  between = -(log_snr[1:] + log_snr[:-1]) / 2
  # A cosine of pi / 2 rounds to less than 0.
  sigma = jnp.maximum(path.sigma(t), 0.0)
  found = 2.0 * (jnp.log(sigma) - jnp.log(path.alpha(t)))
  table = jnp.asarray(between, jnp.float32)
  return jnp.searchsorted(table, found).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Interpolant:
  """Train on, and read, one quantity of an interpolant; a `process.Process`.

  Attributes:
    path: the coefficients, `paths.Linear`, `GVP`, `VP` or your own.
    prediction: what the network gives: the velocity, the noise, or the score.
      Of an output of 2C channels the second half is discarded, as in SiT, whose
      networks are built to predict a variance as well.
    weight: of the squared error of noise or score: 'none' (1), 'velocity'
      ((w*/sigma)^2, as if the velocity was scored) or 'likelihood'
      (w*/sigma^2).
    train_eps: distance of training times from the ends, see `interval`. None
      takes the path's own.
    sample_eps: the same of sampling.
    density: (keys [B], *, within) -> [B] in [0, 1], spread over the training
      interval. `within`, the ends of a part of [0, 1] or None, is for training
      by noise level; see `uniform`.
    index: (path, t [B]) -> int32 [B], the noise level for experts and masks,
      which does not rise with t.
    time_scale: what t is multiplied by before it is embedded. SiT embeds t as
      it is; some rectified flows embed 1000 t or 10000 t.
  """

  path: Path = paths.Linear()
  prediction: Quantity = 'velocity'
  weight: Literal['none', 'velocity', 'likelihood'] = 'none'
  train_eps: float | None = None
  sample_eps: float | None = None
  density: Callable[..., jax.Array] = uniform
  index: Callable[..., jax.Array] = linear_index
  time_scale: float = 1.0

  def __post_init__(self):
    if self.prediction not in Quantity.__args__:
      raise ValueError(
        '`objective.process.prediction` must be one of '
        f'{Quantity.__args__}, found {self.prediction!r}'
      )
    if self.weight not in ('none', 'velocity', 'likelihood'):
      raise ValueError(
        "`objective.process.weight` must be 'none', 'velocity' or "
        f"'likelihood', found {self.weight!r}"
      )
    if self.prediction == 'velocity' and self.weight != 'none':
      raise ValueError(
        'the velocity loss has no weight: `objective.process.weight` must be '
        f"'none', found {self.weight!r}"
      )
    if not any(self._own_margins()) and self.train_eps:
      raise ValueError(
        'a velocity is finite at both ends of this path and trains on all of '
        '[0, 1]: `objective.process.train_eps` must be None, found '
        f'{self.train_eps}'
      )

  def draw_time(self, keys: jax.Array) -> jax.Array:
    """Return training times f32 [B], one key each."""
    t0, t1 = self.train_interval()
    return t0 + self.density(keys).astype(jnp.float32) * (t1 - t0)

  def draw_within(
    self, keys: jax.Array, low: jax.Array, high: jax.Array
  ) -> jax.Array:
    """Return training times f32 [B] whose noise levels are in a range.

    Args:
      keys: one a time [B].
      low: int32 [B], the first noise level.
      high: int32 [B], the one after the last.

    Raises:
      TypeError: `density` cannot be cut to a range.
    """
    if 'within' not in inspect.signature(self.density).parameters:
      raise TypeError(
        'expected `objective.process.density` to take within=(low, high), for '
        'training by noise level, as `ops.interpolants.uniform` does; found '
        f'{self.density}'
      )
    t0, t1 = self.train_interval()
    after, until = (jnp.asarray(edge) for edge in self._edges)
    first, last = (jnp.clip(t, t0, t1) for t in (after[high], until[low]))
    from_start, to_end = high == base.NOISE_LEVELS, low == 0
    ends = Ends(
      jnp.where(from_start, 0.0, (first - t0) / (t1 - t0)),
      jnp.where(to_end, 1.0, (last - t0) / (t1 - t0)),
    )
    t = t0 + self.density(keys, within=ends).astype(jnp.float32) * (t1 - t0)
    # Rounding may have left the range; that of training is never cut.
    t = jnp.where(from_start, t, jnp.maximum(t, first))
    t = jnp.where(to_end, t, jnp.minimum(t, last))
    return jnp.where(from_start & to_end, self.draw_time(keys), t)

  def has_time_within(self, low: int, high: int) -> bool:
    """Return whether a training time has a noise level of low to high - 1."""
    t0, t1 = self.train_interval()
    first, last = self._edges[0][high], self._edges[1][low]
    return bool(max(first, t0) <= min(last, t1))

  def model_time(self, t: jax.Array) -> jax.Array:
    """Return the number f32 [B] that the network embeds."""
    return t.astype(jnp.float32) * self.time_scale

  def noise_index(self, t: jax.Array) -> jax.Array:
    """Return the noise level int32 [B], 0 the cleanest."""
    return self.index(self.path, t)

  def corrupt(self, x0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
    """Return x_t = alpha x0 + sigma eps."""
    alpha, sigma = self.path.alpha(t), self.path.sigma(t)
    return bcast(alpha, x0) * x0 + bcast(sigma, x0) * eps

  def target(self, x0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
    """Return the velocity alpha' x0 + sigma' eps."""
    d_alpha, d_sigma = self.path.d_alpha(t), self.path.d_sigma(t)
    return bcast(d_alpha, x0) * x0 + bcast(d_sigma, x0) * eps

  def loss(
    self,
    output: jax.Array,
    x0: jax.Array,
    eps: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the weighted mean squared error f32 [B], and it unweighted.

    The error of a score is that of the noise it stands for,
    |sigma s + eps|^2.
    """
    output = self._read(output, x_t)
    if self.prediction == 'velocity':
      error = output - self.target(x0, eps, t)
    elif self.prediction == 'noise':
      error = output - eps
    else:
      error = bcast(self.path.sigma(t), x_t) * output + eps
    mse = likelihood.mean(jnp.square(error))
    return self._weight(t) * mse, {'mse': mse}

  def predict(
    self, output: jax.Array, x_t: jax.Array, t: jax.Array
  ) -> base.Prediction:
    """Read the output as data, noise, velocity and score.

    Only what the path determines at t is finite: at t = 0 of a path from pure
    noise, noise and score say nothing about the data.
    """
    x_t = x_t.astype(jnp.float32)
    v, score = self.velocity(output, x_t, t), self.score(output, x_t, t)
    output = self._read(output, x_t)
    path = self.path
    alpha, sigma = bcast(path.alpha(t), x_t), bcast(path.sigma(t), x_t)
    if self.prediction == 'velocity':
      d_alpha = bcast(path.d_alpha(t), x_t)
      d_sigma = bcast(path.d_sigma(t), x_t)
      eps = paths.noise_from_velocity(path, v, x_t, t)
      x0 = (d_sigma * x_t - sigma * v) / (alpha * d_sigma - d_alpha * sigma)
    else:
      eps = output if self.prediction == 'noise' else -sigma * output
      x0 = (x_t - sigma * eps) / alpha
    return base.Prediction(x0=x0, eps=eps, v=v, score=score)

  def velocity(
    self, output: jax.Array, x_t: jax.Array, t: jax.Array
  ) -> jax.Array:
    """Return the velocity f32 [B, ...], which an ODE follows."""
    output = self._read(output, x_t)
    if self.prediction == 'velocity':
      return output
    return paths.velocity_from_score(self.path, self._score(output, t), x_t, t)

  def score(self, output: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """Return the gradient f32 [B, ...] of the log-density of x_t."""
    output = self._read(output, x_t)
    if self.prediction == 'velocity':
      return paths.score_from_velocity(self.path, output, x_t, t)
    return self._score(output, t)

  def margins(self) -> tuple[float, float]:
    """Return how far training and sampling stay from undefined ends."""
    given = (self.train_eps, self.sample_eps)
    pairs = zip(given, self._own_margins(), strict=True)
    train, sample = (own if eps is None else eps for eps, own in pairs)
    return train, sample

  def train_interval(self) -> tuple[float, float]:
    """Return the first and the last time of training."""
    return interval(self.path, self.prediction, self.margins()[0])

  def sample_interval(
    self,
    *,
    sde: bool = False,
    form: Form = 'sigma',
    last_step_size: float = 0.0,
  ) -> tuple[float, float]:
    """Return the first and the last time of sampling, see `interval`.

    Raises:
      ValueError: the diffusion is infinite at the first time.
    """
    eps = self.margins()[1]
    if sde and form == 'sbdm' and self.path.from_pure_noise and not eps:
      raise ValueError(
        "the 'sbdm' diffusion is infinite at t = 0: set "
        '`objective.process.sample_eps`, say to 1e-3, or take another '
        "`objective.sampling.sampler.form`, say 'sigma'"
      )
    return interval(
      self.path,
      self.prediction,
      eps,
      sde=sde,
      form=form,
      last_step_size=last_step_size,
    )

  @functools.cached_property
  def _edges(self) -> tuple[np.ndarray, np.ndarray]:
    """Return the first time below, and the last one of, a noise level.

    Both f32 [NOISE_LEVELS + 1]. Floats from 0 to 1 are ordered as their bits
    are, so halving the range of these finds the edges exactly.
    """
    level = np.arange(base.NOISE_LEVELS + 1)
    low = np.full(level.shape, -1, np.int32)
    high = np.full(level.shape, np.float32(1.0).view(np.int32) + 1, np.int32)
    index = jax.jit(self.noise_index)
    with jax.ensure_compile_time_eval():
      while np.any(high - low > 1):
        middle = low + (high - low) // 2
        t = jnp.asarray(np.maximum(middle, 0).view(np.float32))
        noisy = np.asarray(index(t)) >= level
        low, high = np.where(noisy, middle, low), np.where(noisy, high, middle)
    after, last = np.maximum(high + _SLACK, 0), np.maximum(low - _SLACK, 0)
    return after.view(np.float32), last.view(np.float32)

  def _score(self, output, t):
    """Return the score that a predicted noise stands for, or a score."""
    if self.prediction == 'score':
      return output
    return -output / bcast(self.path.sigma(t), output)

  def _own_margins(self):
    if self.prediction == 'velocity' and self.path.from_pure_noise:
      return 0.0, 0.0
    return self.path.default_eps

  def _weight(self, t):
    if self.weight == 'none':
      return jnp.ones_like(t)
    w, sigma = self.path.score_weight(t), self.path.sigma(t)
    if self.weight == 'velocity':
      return jnp.square(w / sigma)
    return w / jnp.square(sigma)

  def _read(self, output, x_t):
    """Return the channels of the output that speak of x_t, in float32."""
    channels = x_t.shape[-1]
    if output.shape[-1] not in (channels, 2 * channels):
      raise ValueError(
        f'expected an output of {channels} or {2 * channels} channels for '
        f'x_t of {channels}, found {output.shape[-1]}; change '
        '`objective.denoiser.channels`'
      )
    return output[..., :channels].astype(jnp.float32)
