"""Thin out overlapping segments, on the host, in float32.

Hard suppression and soft suppression (Bodla et al. 2017) in one dimension, and
the voting of ActionFormer's post-processing.
"""

from typing import Literal

import numpy as np

Method = Literal['hard', 'linear', 'gaussian']

_LEAST = np.float32(1e-6)


def tiou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Return the IoU [n, m] of segments a [n, 2] and b [m, 2]; NaN for 0 / 0."""
  low = np.maximum(a[:, None, 0], b[None, :, 0])
  high = np.minimum(a[:, None, 1], b[None, :, 1])
  shared = np.maximum(high - low, 0)
  total = (a[:, 1] - a[:, 0])[:, None] + (b[:, 1] - b[:, 0])[None]
  with np.errstate(invalid='ignore', divide='ignore'):
    return shared / (total - shared)


def soft_nms(
  segments: np.ndarray,
  scores: np.ndarray,
  *,
  method: Method = 'gaussian',
  sigma: float = 0.5,
  threshold: float = 0.1,
  min_score: float = 0.001,
  count: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Select the best segment again and again, lowering those it overlaps.

  Args:
    segments: f32 [n, 2].
    scores: f32 [n].
    method: factor of a score at overlap u with what was selected: 'gaussian'
      exp(-u^2 / sigma), 'linear' 1 - u above the threshold, 'hard' 0 above it.
    sigma: see above.
    threshold: see above.
    min_score: what falls below it is dropped; the first selected never is.
    count: stop after so many; the same as the first `count` of all.

  Returns:
    Indices int [k] in the order of selection, and scores f32 [k] as they were
    then.
  """
  order = np.arange(len(scores))
  left, right = np.asarray(segments, np.float32).T.copy()
  scores = np.asarray(scores, np.float32).copy()
  area = right - left + _LEAST
  chosen, values = [], []
  while len(order) and (count is None or len(chosen) < count):
    # Position 0 of what is left is free after the best went: the release
    # moves the first there and fills gaps from the end, which decides ties.
    best = int(scores[order].argmax())
    order[[0, best]] = order[[best, 0]]
    one, order = order[0], order[1:]
    chosen.append(one)
    values.append(scores[one])
    shared = np.minimum(right[order], right[one])
    shared -= np.maximum(left[order], left[one])
    shared = np.maximum(shared, 0)
    overlap = shared / (area[order] + area[one] - shared)
    scores[order] *= _factor(overlap, method, sigma, threshold)
    order = _fill_gaps(order, scores[order] >= min_score)
  return np.array(chosen, int), np.array(values, np.float32)


def hard_nms(
  segments: np.ndarray,
  scores: np.ndarray,
  *,
  threshold: float,
  min_score: float = 0.0,
  count: int | None = None,
) -> np.ndarray:
  """Select segments by score, dropping those that overlap a better one.

  Args:
    segments: f32 [n, 2].
    scores: f32 [n].
    threshold: overlap from which a segment is dropped.
    min_score: above 0, scores must be above it.
    count: stop after so many.

  Returns:
    Indices int [k], the best first; of equal scores the earlier goes first.
  """
  left, right = np.asarray(segments, np.float32).T
  area = right - left + _LEAST
  order = np.argsort(-np.asarray(scores, np.float32), kind='stable')
  if min_score > 0:
    order = order[np.asarray(scores)[order] > min_score]
  chosen = []
  while len(order) and (count is None or len(chosen) < count):
    one, order = order[0], order[1:]
    chosen.append(one)
    shared = np.minimum(right[order], right[one])
    shared = np.maximum(shared - np.maximum(left[order], left[one]), 0)
    order = order[shared / (area[order] + area[one] - shared) < threshold]
  return np.array(chosen, int)


def vote(
  kept: np.ndarray,
  segments: np.ndarray,
  scores: np.ndarray,
  threshold: float,
  *,
  lone: Literal['keep', 'nan'] = 'keep',
) -> np.ndarray:
  """Replace each segment by the mean of what it overlaps, weighed by scores.

  Args:
    kept: f32 [k, 2].
    segments: f32 [n, 2] to average, from before the suppression.
    scores: f32 [n].
    threshold: overlap from which a segment counts.
    lone: what becomes of a segment that overlaps nothing so much, not even
      itself because it has no length: it stays, or is NaN as in the release.

  Returns:
    f32 [k, 2].
  """
  weights = (tiou(kept, segments) >= threshold) * scores.astype(np.float32)
  total = weights.sum(1, keepdims=True)
  with np.errstate(invalid='ignore', divide='ignore'):
    voted = ((weights / total) @ segments).astype(np.float32)
  return np.where(total > 0, voted, kept) if lone == 'keep' else voted


def _factor(overlap, method: Method, sigma: float, threshold: float):
  if method == 'gaussian':
    return np.exp(-(overlap * overlap) / np.float32(sigma))
  kept = 1 - overlap if method == 'linear' else np.zeros_like(overlap)
  return np.where(overlap >= threshold, kept, np.float32(1))


def _fill_gaps(order: np.ndarray, stay: np.ndarray) -> np.ndarray:
  """Drop entries, each replaced by the last one that stays."""
  n = int(stay.sum())
  gaps = np.flatnonzero(~stay[:n])
  order = order.copy()
  order[gaps] = order[n:][stay[n:]][::-1]
  return order[:n]
