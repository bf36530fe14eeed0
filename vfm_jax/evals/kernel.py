"""Compare two sets of features by the distance of means in a kernel's space."""

import numpy as np


def kernel_distance(
  x: np.ndarray,
  y: np.ndarray,
  *,
  subsets: int = 100,
  subset_size: int = 1000,
  seed: int = 0,
) -> tuple[float, float]:
  """Return mean and standard deviation of the distance over random subsets.

  It is the unbiased squared MMD with the kernel (x·y / D + 1)³, known as KID
  with Inception features (arXiv:1801.01401, section 4).

  Args:
    x: features [n, D].
    y: features [m, D].
    subsets: number of pairs of subsets.
    subset_size: rows of each, drawn without replacement.
    seed: of the draws.

  Raises:
    ValueError: widths differ, or a set is smaller than a subset.
  """
  if x.ndim != 2 or x.shape[1:] != y.shape[1:]:
    raise ValueError(
      f'expected features [n, D] and [m, D], found {x.shape} and {y.shape}'
    )
  if not 2 <= subset_size <= min(len(x), len(y)):
    raise ValueError(
      f'subset_size: expected 2 to {min(len(x), len(y))}, the smaller set, '
      f'found {subset_size}'
    )
  rng = np.random.default_rng(seed)
  values = [
    unbiased_mmd(
      x[rng.choice(len(x), subset_size, replace=False)],
      y[rng.choice(len(y), subset_size, replace=False)],
    )
    for _ in range(subsets)
  ]
  return float(np.mean(values)), float(np.std(values))


def unbiased_mmd(x: np.ndarray, y: np.ndarray) -> float:
  """Return the unbiased squared MMD of all rows of x [n, D] and y [m, D]."""
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  within = sum(_off_diagonal_mean(z) for z in (x, y))
  return float(within - 2 * _kernel(x, y).mean())


def _off_diagonal_mean(x: np.ndarray) -> float:
  k, n = _kernel(x, x), len(x)
  return (k.sum() - np.trace(k)) / (n * (n - 1))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  return (x @ y.T / x.shape[1] + 1) ** 3
