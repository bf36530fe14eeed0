"""Give the coefficients of paths from noise to data (SiT, rectified flow).

Time runs from 0, noise, to 1, data: x_t = alpha(t) x0 + sigma(t) eps, with x0
the data and eps ~ N(0, I), and the velocity is its derivative by t. (The
papers call the noise x_0 and the data x_1.) Sources: SiT, arXiv:2401.08740,
section 2 and table 1; stochastic interpolants, arXiv:2303.08797; VP as in
arXiv:2011.13456.
"""

import dataclasses
from typing import ClassVar, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from vfm_jax.ops.process import bcast

Form = Literal[
  'constant',
  'sbdm',
  'sigma',
  'linear',
  'decreasing',
  'increasing_decreasing',
]


@runtime_checkable
class Path(Protocol):
  """Give the coefficients of an interpolant at a time, f32 of any shape.

  Attributes:
    from_pure_noise: whether alpha(0) = 0. Then what divides by alpha must not
      be asked for at t = 0.
    default_eps: how far training and sampling stay from an end at which noise
      and score do not determine the velocity.
  """

  from_pure_noise: ClassVar[bool]
  default_eps: ClassVar[tuple[float, float]]

  def alpha(self, t: jax.Array) -> jax.Array:
    """Return the coefficient of the data."""
    ...

  def d_alpha(self, t: jax.Array) -> jax.Array:
    """Return its derivative."""
    ...

  def sigma(self, t: jax.Array) -> jax.Array:
    """Return the coefficient of the noise."""
    ...

  def d_sigma(self, t: jax.Array) -> jax.Array:
    """Return its derivative."""
    ...

  def log_slope(self, t: jax.Array) -> jax.Array:
    """Return alpha' / alpha."""
    ...

  def score_weight(self, t: jax.Array) -> jax.Array:
    """Return w* = (alpha' / alpha) sigma^2 - sigma sigma'.

    It is the coefficient of the score in the velocity, and half the squared
    diffusion of the time-reversed process of score-based diffusion models.
    """
    ...


@dataclasses.dataclass(frozen=True)
class Linear:
  """Interpolate straight from noise to data: alpha = t, sigma = 1 - t."""

  from_pure_noise: ClassVar[bool] = True
  default_eps: ClassVar[tuple[float, float]] = (1e-3, 1e-3)

  def alpha(self, t):
    """Return the coefficient of the data."""
    return t

  def d_alpha(self, t):
    """Return its derivative."""
    return jnp.ones_like(t)

  def sigma(self, t):
    """Return the coefficient of the noise."""
    return 1.0 - t

  def d_sigma(self, t):
    """Return its derivative."""
    return -jnp.ones_like(t)

  def log_slope(self, t):
    """Return alpha' / alpha."""
    return 1.0 / t

  def score_weight(self, t):
    """Return the coefficient of the score in the velocity."""
    return (1.0 - t) / t


@dataclasses.dataclass(frozen=True)
class GVP:
  """Keep the variance along a quarter circle: alpha = sin(pi t / 2)."""

  from_pure_noise: ClassVar[bool] = True
  default_eps: ClassVar[tuple[float, float]] = (1e-3, 1e-3)

  def alpha(self, t):
    """Return the coefficient of the data."""
    return jnp.sin(0.5 * jnp.pi * t)

  def d_alpha(self, t):
    """Return its derivative."""
    return 0.5 * jnp.pi * jnp.cos(0.5 * jnp.pi * t)

  def sigma(self, t):
    """Return the coefficient of the noise."""
    return jnp.cos(0.5 * jnp.pi * t)

  def d_sigma(self, t):
    """Return its derivative."""
    return -0.5 * jnp.pi * jnp.sin(0.5 * jnp.pi * t)

  def log_slope(self, t):
    """Return alpha' / alpha."""
    return 0.5 * jnp.pi / jnp.tan(0.5 * jnp.pi * t)

  def score_weight(self, t):
    """Return the coefficient of the score in the velocity."""
    # cos^3 / sin + sin cos = cos / sin
    return self.log_slope(t)


@dataclasses.dataclass(frozen=True)
class VP:
  """Follow the variance-preserving diffusion with a linear beta.

  With s = 1 - t the time of the diffusion and beta(s) = beta_min +
  s (beta_max - beta_min), alpha = exp(-1/2 int_0^s beta), and sigma^2 =
  1 - alpha^2.

  Attributes:
    beta_min: beta at the data.
    beta_max: beta at the noise.
  """

  beta_min: float = 0.1
  beta_max: float = 20.0

  from_pure_noise: ClassVar[bool] = False
  default_eps: ClassVar[tuple[float, float]] = (1e-5, 1e-3)

  def alpha(self, t):
    """Return the coefficient of the data."""
    return jnp.exp(self._log_alpha(t))

  def d_alpha(self, t):
    """Return its derivative."""
    return self.alpha(t) * self.log_slope(t)

  def sigma(self, t):
    """Return the coefficient of the noise."""
    return jnp.sqrt(-jnp.expm1(2.0 * self._log_alpha(t)))

  def d_sigma(self, t):
    """Return its derivative."""
    return -self.alpha(t) * self.d_alpha(t) / self.sigma(t)

  def log_slope(self, t):
    """Return alpha' / alpha."""
    return 0.5 * (self.beta_min + (1 - t) * (self.beta_max - self.beta_min))

  def score_weight(self, t):
    """Return the coefficient of the score in the velocity."""
    # (alpha' / alpha) (sigma^2 + alpha^2)
    return self.log_slope(t)

  def _log_alpha(self, t):
    s = 1.0 - t
    rise = self.beta_max - self.beta_min
    return -0.25 * jnp.square(s) * rise - 0.5 * s * self.beta_min


def score_from_velocity(path: Path, v: jax.Array, x_t: jax.Array, t: jax.Array):
  """Return the score [B, ...] of x_t whose velocity is v.

  Args:
    path: the interpolant.
    v: f32 [B, ...].
    x_t: f32 [B, ...].
    t: f32 [B].
  """
  q, sigma, d_sigma = _velocity_terms(path, x_t, t)
  return (q * v - x_t) / (sigma * sigma - q * d_sigma * sigma)


def noise_from_velocity(path: Path, v: jax.Array, x_t: jax.Array, t: jax.Array):
  """Return the noise [B, ...] in x_t whose velocity is v."""
  q, sigma, d_sigma = _velocity_terms(path, x_t, t)
  return (q * v - x_t) / (q * d_sigma - sigma)


def velocity_from_score(path: Path, s: jax.Array, x_t: jax.Array, t: jax.Array):
  """Return the velocity [B, ...] at x_t whose score is s."""
  slope, weight = path.log_slope(t), path.score_weight(t)
  return bcast(slope, x_t) * x_t + bcast(weight, x_t) * s


def _velocity_terms(path, x, t):
  q = path.alpha(t) / path.d_alpha(t)
  return tuple(bcast(c, x) for c in (q, path.sigma(t), path.d_sigma(t)))


def diffusion(
  path: Path, t: jax.Array, form: Form = 'sigma', norm: float = 1.0
) -> jax.Array:
  """Return w(t) of the SDE dX = (v + w s) dt + sqrt(2 w) dW.

  Every w >= 0 gives the same marginals (SiT, section 2.4). `sbdm` is the one
  of score-based diffusion models; it is infinite at t = 0 on a path that starts
  from pure noise.

  Args:
    path: the interpolant.
    t: f32, any shape.
    form: the shape of w.
    norm: its size. In `decreasing` it stands inside the square.
  """
  if form == 'constant':
    return jnp.full_like(t, norm)
  if form == 'sbdm':
    return norm * path.score_weight(t)
  if form == 'sigma':
    return norm * path.sigma(t)
  if form == 'linear':
    return norm * (1.0 - t)
  if form == 'decreasing':
    return 0.25 * jnp.square(norm * jnp.cos(jnp.pi * t) + 1.0)
  if form == 'increasing_decreasing':
    return norm * jnp.square(jnp.sin(jnp.pi * t))
  raise ValueError(
    f'`form` must be one of {Form.__args__}, found {form!r}; change the '
    'diffusion form of the sampler'
  )
