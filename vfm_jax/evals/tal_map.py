"""Score detected actions: mean average precision over overlaps, in numpy.

The measure of the ActivityNet challenge (Caba Heilbron et al. 2015), as
ActionFormer's evaluation computes it: per class and overlap, interpolated
average precision; the mean over the classes of the truth; the mean over
overlaps.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from vfm_jax.evals.nms import tiou
from vfm_jax.evals.tal_annotations import Instance, without_duplicates

THUMOS = (0.3, 0.4, 0.5, 0.6, 0.7)
ACTIVITYNET = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


class Detections(NamedTuple):
  """Hold what was found in a set of videos, in any order.

  Attributes:
    videos: [n] video ids.
    segments: f32 [n, 2] start and end in seconds.
    labels: int [n].
    scores: f32 [n].
  """

  videos: list[str]
  segments: np.ndarray
  labels: np.ndarray
  scores: np.ndarray


class Scores(NamedTuple):
  """Hold the measure.

  Attributes:
    ap: f64 [overlaps, classes of the truth].
    by_overlap: f64 [overlaps] mean over classes.
    average: mean over overlaps.
    classes: int [classes of the truth].
  """

  ap: np.ndarray
  by_overlap: np.ndarray
  average: float
  classes: np.ndarray


def mean_average_precision(
  truth: Mapping[str, Sequence[Instance]],
  found: Detections,
  overlaps: Sequence[float],
  *,
  unknown: Literal['ignore', 'reindexed'] = 'ignore',
) -> Scores:
  """Compare detections with the truth.

  Of the truth, actions without a length and repeated ones are left out. A
  detection takes, of the actions that overlap it enough, the one it overlaps
  most that is still free; without one it is a false positive. A class that
  nothing was found of has precision 0.

  Args:
    truth: {video: its actions}; other videos may only give false positives.
    found: what is scored.
    overlaps: IoU from which a detection counts.
    unknown: what becomes of detections whose class the truth has not: they
      are left out, or counted, as in the release, for the class of the truth
      whose place among its classes in order has the same number.

  Raises:
    ValueError: the truth is empty, or a detection is not finite.
  """
  actions = [
    (video, a)
    for video, of_video in truth.items()
    for a in without_duplicates(of_video)
    if a.end > a.start
  ]
  if not actions:
    raise ValueError('the truth holds no action to find')
  if (
    not np.isfinite(found.segments).all() or not np.isfinite(found.scores).all()
  ):
    raise ValueError('a detection has an end or a score that is not finite')
  classes = np.unique([a.label for _, a in actions])
  labels = np.asarray(found.labels)
  place = np.searchsorted(classes, labels).clip(max=len(classes) - 1)
  known = classes[place] == labels if len(labels) else np.zeros(0, bool)
  other = labels if unknown == 'reindexed' else -1
  place = np.where(known, place, other)
  ap = np.zeros((len(overlaps), len(classes)))
  for c, label in enumerate(classes):
    spans: dict[str, list] = {}
    for video, a in actions:
      if a.label == label:
        spans.setdefault(video, []).append((a.start, a.end))
    of_class = {video: np.array(x, np.float64) for video, x in spans.items()}
    rows = np.flatnonzero(place == c)
    ap[:, c] = _of_class(of_class, found, rows, np.asarray(overlaps))
  by_overlap = ap.mean(1)
  return Scores(ap, by_overlap, float(by_overlap.mean()), classes)


def interpolated_ap(precision: np.ndarray, recall: np.ndarray) -> float:
  """Return the area under precision, made monotone, over recall (VOC 2010).

  Args:
    precision: [n], in the order of falling scores.
    recall: [n].
  """
  precision = np.concatenate([[0.0], precision, [0.0]])
  recall = np.concatenate([[0.0], recall, [1.0]])
  precision = np.maximum.accumulate(precision[::-1])[::-1]
  return float(np.sum(np.diff(recall) * precision[1:]))


def _of_class(
  truth: Mapping[str, np.ndarray],
  found: Detections,
  rows: np.ndarray,
  overlaps: np.ndarray,
) -> np.ndarray:
  """Return the average precision at each overlap."""
  if not len(rows):
    return np.zeros(len(overlaps))
  # Of equal scores, and of equal overlaps, the later goes first.
  rows = rows[np.argsort(found.scores[rows], kind='stable')[::-1]]
  by_video: dict[str, list[int]] = {}
  for rank, row in enumerate(rows):
    by_video.setdefault(found.videos[row], []).append(rank)
  hit = np.zeros((len(overlaps), len(rows)), bool)
  for video in truth.keys() & by_video.keys():
    spans, ranks = truth[video], np.array(by_video[video])
    iou = tiou(np.asarray(found.segments)[rows[ranks]], spans)
    taken = np.zeros((len(overlaps), len(spans)), bool)
    for i in np.flatnonzero(iou.max(1) >= overlaps.min()):
      for j in np.argsort(iou[i], kind='stable')[::-1]:
        new = (iou[i, j] >= overlaps) & ~taken[:, j] & ~hit[:, ranks[i]]
        taken[new, j] = True
        hit[new, ranks[i]] = True
  positives = np.cumsum(hit, axis=1)
  recall = positives / sum(map(len, truth.values()))
  precision = positives / np.arange(1, len(rows) + 1)
  return np.array(
    [interpolated_ap(p, r) for p, r in zip(precision, recall, strict=True)]
  )
