"""Discrete Gaussian diffusion: tables, posterior, predictions and losses.

Step t in 0 .. T-1 gives x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps; t = 0 has
one step of noise (DDPM, arXiv:2006.11239, with the learned variance and the
hybrid loss of Improved DDPM, arXiv:2102.09672). Tables are float64 numpy and
rounded to float32 where they are used.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from vfm_jax.ops import likelihood, noise
from vfm_jax.ops.process import NOISE_LEVELS, Prediction, bcast

# What restricts a predicted x0 before anything is derived from it.
Restrict = Callable[[jax.Array], jax.Array]


def unit_range(x0: jax.Array) -> jax.Array:
  """Clip to [-1, 1]: for pixels, never for latents."""
  return jnp.clip(x0, -1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Gaussian:
  """Noise in T discrete steps; satisfies `ops.process.Process`.

  Attributes:
    steps: number of steps T.
    schedule: function T -> beta, see `ops.noise`.
    predicts: what the first C channels of the output mean; v is
      sqrt(abar) eps - sqrt(1 - abar) x0 (arXiv:2202.00512).
    variance: of the reverse step. 'learned' reads C more channels as the place
      between its two bounds (arXiv:2102.09672, eq. 15), from -1, the
      posterior's variance, to 1, beta; 'small' and 'large' are the bounds.
    criterion: 'mse' is the squared error, plus the variational bound when the
      variance is learned, which then moves the variance alone; 'rescaled_mse'
      multiplies that bound by T / 1000; 'kl' is the bound alone and
      'rescaled_kl' T times it.
    weight: of the squared error by noise level, see `ops.noise`.
    respacing: which steps are kept, for sampling; see `ops.noise.respacing`.
      Steps are then numbered by what is left of them.
  """

  steps: int = 1000
  schedule: Callable[..., np.ndarray] = noise.linear
  predicts: Literal['eps', 'x0', 'v'] = 'eps'
  variance: Literal['learned', 'small', 'large'] = 'learned'
  criterion: Literal['mse', 'rescaled_mse', 'kl', 'rescaled_kl'] = 'mse'
  weight: Callable[..., jax.Array] = noise.unit_weight
  respacing: str = ''

  @functools.cached_property
  def kept(self) -> np.ndarray:
    """Return the numbers of the kept steps in the whole process, int64 [T]."""
    return noise.respacing(self.steps, self.respacing)

  @functools.cached_property
  def tables(self) -> noise.Tables:
    """Return the tables of the kept steps.

    Raises:
      ValueError: the schedule gives variances outside (0, 1].
    """
    beta = self.schedule(self.steps)
    if not np.all((beta > 0) & (beta <= 1)):
      raise ValueError(
        'expected variances in (0, 1] from `objective.process.schedule`, found '
        f'{beta.min():.3g} to {beta.max():.3g} for {self.steps} steps; change '
        'it or `objective.process.steps` (`linear` needs more than 20)'
      )
    abar = np.cumprod(1.0 - beta)[self.kept]
    return noise.tables(1.0 - abar / np.append(1.0, abar[:-1]))

  @property
  def num_kept(self) -> int:
    """Return the number of steps that are kept."""
    return len(self.kept)

  def respaced(self, spec: str) -> 'Gaussian':
    """Return the process that keeps the steps that `spec` says."""
    return dataclasses.replace(self, respacing=spec)

  def draw_time(self, keys: jax.Array) -> jax.Array:
    """Return a step int32 [B] a key, all alike likely.

    Raises:
      ValueError: the process is respaced: a network is trained on all steps.
    """
    self._check_whole()
    return jax.vmap(lambda k: jax.random.randint(k, (), 0, self.steps))(keys)

  def draw_within(
    self, keys: jax.Array, low: jax.Array, high: jax.Array
  ) -> jax.Array:
    """Return a step int32 [B] a key, all of the noise levels alike likely.

    Args:
      keys: one a step [B].
      low: int32 [B], the first noise level.
      high: int32 [B], the one after the last.

    Raises:
      ValueError: as `draw_time`.
    """
    self._check_whole()
    levels = jnp.asarray(self._levels)
    first, end = (jnp.searchsorted(levels, x) for x in (low, high))
    draw = lambda k, a, b: jax.random.randint(k, (), a, b)  # noqa: E731
    # Where a range has no step this is the one next to it.
    t = jax.vmap(draw)(keys, first, end)
    return jnp.minimum(t, self.steps - 1)

  def has_time_within(self, low: int, high: int) -> bool:
    """Return whether a step has one of the noise levels low to high - 1."""
    return bool(np.any((low <= self._levels) & (self._levels < high)))

  def original(self, t: jax.Array) -> jax.Array:
    """Return the steps' numbers in the whole process, int32 [B]."""
    return jnp.asarray(self.kept, jnp.int32)[t]

  def model_time(self, t: jax.Array) -> jax.Array:
    """Return those numbers as f32 [B], which the network embeds."""
    return self.original(t).astype(jnp.float32)

  def noise_index(self, t: jax.Array) -> jax.Array:
    """Return the noise level int32 [B], 0 .. NOISE_LEVELS - 1."""
    scale = (NOISE_LEVELS - 1) / max(self.steps - 1, 1)
    return jnp.round(self.model_time(t) * scale).astype(jnp.int32)

  def snr(self, t: jax.Array) -> jax.Array:
    """Return the signal-to-noise ratio abar / (1 - abar), f32 [B]."""
    return _at(self.tables.abar / (1.0 - self.tables.abar), t)

  def corrupt(self, x0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
    """Return x_t."""
    signal, sigma = self._scales(t, x0)
    return signal * x0 + sigma * eps

  def marginal(
    self, x0: jax.Array, t: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return mean, variance and its logarithm of q(x_t | x0)."""
    var = 1.0 - self.tables.abar
    mean = self._scales(t, x0)[0] * x0
    return mean, bcast(_at(var, t), x0), bcast(_at(np.log(var), t), x0)

  def posterior(
    self, x0: jax.Array, x_t: jax.Array, t: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return mean, variance and clipped log-variance of q(x_{t-1}|x_t, x0)."""
    at = lambda table: bcast(_at(table, t), x_t)  # noqa: E731
    s = self.tables
    mean = at(s.post_x0) * x0 + at(s.post_xt) * x_t
    return mean, at(s.post_var), at(s.post_logvar)

  def predict(
    self,
    output: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    *,
    restrict: Restrict | None = None,
  ) -> Prediction:
    """Read the output of the network.

    Args:
      output: f32 [B, ..., C], or 2C with a learned variance.
      x_t: f32 [B, ..., C].
      t: int32 [B] steps.
      restrict: what is done to x0 before eps and the mean are derived from it,
        for example `unit_range`.
    """
    first, second = self._split(output, x_t)
    signal, sigma = self._scales(t, x_t)
    if self.predicts == 'eps':
      x0 = self.clean(first, x_t, t)
    elif self.predicts == 'x0':
      x0 = first
    else:
      x0 = signal * x_t - sigma * first
    if restrict is not None:
      x0 = restrict(x0)
    mean = self.posterior(x0, x_t, t)[0]
    logvar = self._logvar(second, x_t, t)
    return Prediction(x0, self.noise_of(x0, x_t, t), mean, logvar)

  def clean(self, eps: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """Return x0 = (x_t - sqrt(1 - abar) eps) / sqrt(abar)."""
    a, b = self._inverse(t, x_t)
    return a * x_t - b * eps

  def noise_of(self, x0: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """Return eps = (x_t - sqrt(abar) x0) / sqrt(1 - abar)."""
    a, b = self._inverse(t, x_t)
    return (a * x_t - x0) / b

  def loss(
    self,
    output: jax.Array,
    x0: jax.Array,
    eps: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the loss f32 [B] and its parts 'mse' (unweighted) and 'vb'."""
    output = output.astype(jnp.float32)
    if self.criterion in ('kl', 'rescaled_kl'):
      vb = self.bound(output, x0, x_t, t)
      scale = self.num_kept if self.criterion == 'rescaled_kl' else 1
      return vb * scale, {'vb': vb}
    first, second = self._split(output, x0)
    signal, sigma = self._scales(t, x0)
    if self.predicts == 'v':
      target = signal * eps - sigma * x0
    else:
      target = {'eps': eps, 'x0': x0}[self.predicts]
    mse = likelihood.mean(jnp.square(target - first))
    loss, parts = self.weight(self.snr(t), self.predicts) * mse, {'mse': mse}
    if second is not None:
      fixed = jnp.concatenate([jax.lax.stop_gradient(first), second], -1)
      vb = self.bound(fixed, x0, x_t, t)
      if self.criterion == 'rescaled_mse':
        vb *= self.num_kept / 1000
      loss, parts = loss + vb, {**parts, 'vb': vb}
    return loss, parts

  def bound(
    self,
    output: jax.Array,
    x0: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    *,
    restrict: Restrict | None = None,
  ) -> jax.Array:
    """Return a step's term of the variational bound, bits a dimension, [B].

    KL(q(x_{t-1} | x_t, x0) | p(x_{t-1} | x_t)), and at step 0 the negative
    log-likelihood of 8-bit pixels in [-1, 1] (arXiv:2006.11239, eqs. 5, 13).
    """
    mean, _, logvar = self.posterior(x0, x_t, t)
    p = self.predict(output, x_t, t, restrict=restrict)
    assert p.mean is not None
    assert p.logvar is not None
    kl = likelihood.mean(likelihood.kl(mean, logvar, p.mean, p.logvar))
    nll = -likelihood.mean(likelihood.log_pixels(x0, p.mean, 0.5 * p.logvar))
    return jnp.where(t == 0, nll, kl) / math.log(2.0)

  def prior_bound(self, x0: jax.Array) -> jax.Array:
    """Return KL(q(x_T | x0) | N(0, 1)), bits a dimension, f32 [B]."""
    t = jnp.full(x0.shape[:1], self.num_kept - 1, jnp.int32)
    mean, _, logvar = self.marginal(x0, t)
    return likelihood.mean(likelihood.kl(mean, logvar, 0.0, 0.0)) / math.log(
      2.0
    )

  @functools.cached_property
  def _levels(self) -> np.ndarray:
    """Return the noise level of each step, int32 [T]."""
    with jax.ensure_compile_time_eval():
      t = jnp.arange(self.num_kept, dtype=jnp.int32)
      return np.asarray(self.noise_index(t))

  def _check_whole(self):
    if self.respacing:
      raise ValueError(
        "expected `objective.process.respacing` '' in training, found "
        f'{self.respacing!r}; give it to the sampler as `steps`'
      )

  def _split(self, output, x):
    """Return the prediction and the variance channels, or None for these."""
    channels = x.shape[-1]
    expected = 2 * channels if self.variance == 'learned' else channels
    if output.shape != (*x.shape[:-1], expected):
      raise ValueError(
        f'expected an output {(*x.shape[:-1], expected)} for '
        f'`objective.process.variance` {self.variance!r}, found '
        f'{tuple(output.shape)}; change it or `objective.denoiser.learn_sigma`'
      )
    output = output.astype(jnp.float32)
    if self.variance != 'learned':
      return output, None
    return output[..., :channels], output[..., channels:]

  def _logvar(self, second, x_t, t):
    s = self.tables
    if self.variance == 'small':
      return bcast(_at(s.post_logvar, t), x_t)
    if self.variance == 'large':
      top = np.append(np.exp(s.post_logvar[0]), s.beta[1:])
      return bcast(_at(np.log(top), t), x_t)
    low, high = (
      bcast(_at(table, t), x_t) for table in (s.post_logvar, np.log(s.beta))
    )
    share = (second + 1.0) / 2.0
    return share * high + (1.0 - share) * low

  def _scales(self, t, x):
    """Return the factors of x0 and of eps in x_t."""
    abar = self.tables.abar
    return tuple(
      bcast(_at(table, t), x) for table in (np.sqrt(abar), np.sqrt(1.0 - abar))
    )

  def _inverse(self, t, x):
    """Return the factors of x_t and of -eps in x0."""
    r = 1.0 / self.tables.abar
    return tuple(
      bcast(_at(table, t), x) for table in (np.sqrt(r), np.sqrt(r - 1.0))
    )


def _at(table: np.ndarray, t: jax.Array) -> jax.Array:
  return jnp.asarray(table, jnp.float32)[t]
