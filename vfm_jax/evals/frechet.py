"""Compare two sets of features by the normal distributions that fit them."""

import dataclasses
from typing import NamedTuple

import numpy as np


class Normal(NamedTuple):
  """Hold a normal distribution of features.

  Attributes:
    mean: f64 [D].
    cov: f64 [D, D].
  """

  mean: np.ndarray
  cov: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
  """Hold what a covariance needs, of rows that come in parts.

  Parts are merged by the update of Chan, Golub and LeVeque (1979) in float64:
  order, sizes and the number of hosts change nothing but the last digits.

  Attributes:
    count: number of rows.
    mean: f64 [D] of the rows.
    scatter: f64 [D, D] sum of the products of their deviations.
  """

  count: int
  mean: np.ndarray
  scatter: np.ndarray

  @classmethod
  def of(cls, rows: np.ndarray) -> 'Moments':
    """Return the moments of rows [n, D], one or more."""
    rows = np.asarray(rows, np.float64)
    if rows.ndim != 2 or not len(rows):
      raise ValueError(f'expected rows [n, D] with n > 0, found {rows.shape}')
    mean = rows.mean(0)
    rows = rows - mean
    return cls(len(rows), mean, rows.T @ rows)

  def merge(self, other: 'Moments') -> 'Moments':
    """Return the moments of the rows of both."""
    count = self.count + other.count
    gap = other.mean - self.mean
    weight = self.count * other.count / count
    return Moments(
      count,
      self.mean + gap * (other.count / count),
      self.scatter + other.scatter + weight * np.outer(gap, gap),
    )

  def normal(self) -> Normal:
    """Return mean and unbiased covariance.

    Raises:
      ValueError: there are fewer than two rows.
    """
    if self.count < 2:
      raise ValueError(f'a covariance needs 2 rows, found {self.count}')
    return Normal(self.mean, self.scatter / (self.count - 1))


def frechet_distance(a: Normal, b: Normal) -> float:
  """Return the squared Fréchet distance of two normal distributions.

  It is |m_a - m_b|² + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Dowson and Landau,
  1982; arXiv:1706.08500, eq. 6). With S = F Fᵀ the trace of the root is the
  sum of the singular values of F_aᵀ F_b, which needs no root of a matrix that
  is singular or not symmetric.

  Raises:
    ValueError: the distributions have different dimensions or are not finite.
  """
  if a.mean.shape != b.mean.shape or a.cov.shape != b.cov.shape:
    raise ValueError(
      'expected two distributions of one dimension, found means '
      f'{a.mean.shape} and {b.mean.shape}, covariances {a.cov.shape} and '
      f'{b.cov.shape}'
    )
  if not all(np.isfinite(x).all() for x in (*a, *b)):
    raise ValueError('expected finite means and covariances')
  gap = np.asarray(a.mean, np.float64) - b.mean
  root = np.linalg.svd(_factor(a.cov).T @ _factor(b.cov), compute_uv=False)
  traces = np.trace(a.cov) + np.trace(b.cov)
  return float(gap @ gap + traces - 2 * root.sum())


def _factor(cov: np.ndarray) -> np.ndarray:
  """Return F [D, rank] with F Fᵀ = cov; directions of rounding are left out.

  Raises:
    ValueError: an eigenvalue is clearly below zero.
  """
  cov = np.asarray(cov, np.float64)
  values, vectors = np.linalg.eigh((cov + cov.T) / 2)
  least = np.finfo(np.float64).eps * len(cov) * max(values[-1], 0.0)
  # Statistics that others computed may be rounded to float32.
  if values[0] < -1e-4 * max(values[-1], 1e-12):
    raise ValueError(
      f'expected a covariance, found the eigenvalue {values[0]:g} below zero'
    )
  keep = values > least
  return vectors[:, keep] * np.sqrt(values[keep])
