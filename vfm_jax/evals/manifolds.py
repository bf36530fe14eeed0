"""Tell fidelity from coverage: improved precision and recall."""

from collections.abc import Iterator

import numpy as np

# Rows whose distances to all others are held at a time.
_BLOCK = 512


def precision_recall(
  real: np.ndarray, generated: np.ndarray, *, k: int = 3
) -> tuple[float, float]:
  """Return how much of each set lies on the manifold of the other.

  The manifold of a set is the union of balls around its members, each just
  large enough for the k-th neighbour; precision is the part of `generated` on
  that of `real`, recall the other way round (arXiv:1904.06991, eq. 1 and 2).
  The evaluator of ADM takes k = 3 and distances in float16; here they are in
  float64.

  Args:
    real: features [n, D].
    generated: features [m, D].
    k: neighbours, not counting a member itself.

  Raises:
    ValueError: widths differ, or a set has no k-th neighbour.
  """
  if real.ndim != 2 or real.shape[1:] != generated.shape[1:]:
    raise ValueError(
      'expected features [n, D] and [m, D], found '
      f'{real.shape} and {generated.shape}'
    )
  if not 1 <= k < min(len(real), len(generated)):
    raise ValueError(
      f'k: expected 1 to {min(len(real), len(generated)) - 1}, one less than '
      f'the smaller set, found {k}'
    )
  # Near the origin the squares lose fewer digits.
  center = real.mean(0, dtype=np.float64)
  real, generated = real - center, generated - center
  inside = (
    _on_manifold(generated, real, _radii(real, k)),
    _on_manifold(real, generated, _radii(generated, k)),
  )
  precision, recall = (float(x.mean()) for x in inside)
  return precision, recall


def _radii(x: np.ndarray, k: int) -> np.ndarray:
  """Return the squared distance of each row's k-th neighbour [n]."""
  # A row is its own nearest neighbour.
  return np.concatenate(
    [np.partition(d, k, axis=1)[:, k] for d in _distances(x, x)]
  )


def _on_manifold(
  x: np.ndarray, members: np.ndarray, radii: np.ndarray
) -> np.ndarray:
  """Return bool [n]: which rows of x lie in any ball around the members."""
  return np.concatenate([(d <= radii).any(1) for d in _distances(x, members)])


def _distances(x: np.ndarray, y: np.ndarray) -> Iterator[np.ndarray]:
  """Yield squared distances [up to _BLOCK, m] for the rows of x in turn."""
  squares = np.square(y).sum(1)
  for first in range(0, len(x), _BLOCK):
    rows = x[first : first + _BLOCK]
    square = np.square(rows).sum(1)[:, None] + squares
    yield np.maximum(square - 2 * rows @ y.T, 0.0)
