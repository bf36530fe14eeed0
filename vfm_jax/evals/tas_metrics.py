"""Score the segmentation of videos: accuracy, edit distance, F1.

The measures of temporal action segmentation (Lea et al., arXiv:1611.05267;
MS-TCN, arXiv:1903.01945). `released` counts as the code behind every
published number does; `exact` counts what that code means to:

* the last segment of a video ends one frame early in the released code; of
  one frame, it has no length and matches nothing;
* a prediction longer than the truth (frames are sampled by 2, their number
  was odd) is cut by `exact` alone;
* without any segment in the truth, `released` has no F1 and an edit score of
  0 / 0 where the prediction has none either; `exact` counts every predicted
  segment as wrong, and two empty sequences as equal.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

Protocol = Literal['exact', 'released']

# Overlaps at which F1 is counted, percent.
OVERLAPS = (10, 25, 50)


class Segments(NamedTuple):
  """Hold maximal runs: class, first frame and end, int [n] each."""

  labels: np.ndarray
  starts: np.ndarray
  ends: np.ndarray


class VideoScore(NamedTuple):
  """Hold what a video adds to the scores of its split.

  Attributes:
    correct: frames that are right.
    frames: frames of the truth.
    edit: edit score, percent.
    counts: int [overlaps, 3] true positives, false positives, misses.
  """

  correct: int
  frames: int
  edit: float
  counts: np.ndarray


def segments(
  y: np.ndarray, background: int | None = None, protocol: Protocol = 'exact'
) -> Segments:
  """Return the runs of the labels int [L] without those of the background."""
  y = np.asarray(y)
  starts = np.flatnonzero(np.r_[True, y[1:] != y[:-1]])
  ends = np.r_[starts[1:], len(y) - (protocol == 'released')]
  labels = y[starts]
  keep = slice(None) if background is None else labels != background
  return Segments(labels[keep], starts[keep], ends[keep])


def edit_score(
  predicted: np.ndarray, truth: np.ndarray, protocol: Protocol = 'exact'
) -> float:
  """Return 100 (1 - d / max(m, n)), d the Levenshtein distance of labels."""
  longest = max(len(predicted), len(truth))
  if not longest:
    return 100.0 if protocol == 'exact' else float('nan')
  return 100.0 * (1.0 - levenshtein(predicted, truth) / longest)


def levenshtein(a: np.ndarray, b: np.ndarray) -> int:
  """Return how many insertions, deletions and changes make b of a."""
  row = list(range(len(b) + 1))
  for i, x in enumerate(a, 1):
    diagonal, row[0] = row[0], i
    for j, y in enumerate(b, 1):
      change = diagonal + (x != y)
      diagonal = row[j]
      row[j] = min(row[j] + 1, row[j - 1] + 1, change)
  return row[-1]


def overlap_counts(
  predicted: Segments,
  truth: Segments,
  overlap: float,
  protocol: Protocol = 'exact',
) -> np.ndarray:
  """Count true positives, false positives and misses, int [3].

  In the order of time each predicted segment is compared with the true one of
  its class that it overlaps most, the first of several; it is right if their
  intersection over union reaches `overlap` and no other took it before.

  Raises:
    ValueError: there is no true segment and the protocol is `released`.
  """
  if not len(truth.labels):
    if protocol == 'released' and len(predicted.labels):
      raise ValueError(
        'the truth holds no segment but background, for which the released '
        "code has no F1; use metrics='exact'"
      )
    return np.array([0, len(predicted.labels), 0])
  taken = np.zeros(len(truth.labels), bool)
  right = 0
  for label, start, end in zip(*predicted, strict=True):
    inter = np.minimum(end, truth.ends) - np.maximum(start, truth.starts)
    union = np.maximum(end, truth.ends) - np.minimum(start, truth.starts)
    # Two segments without length give 0 / 0: the released argmax takes it,
    # and it reaches no overlap.
    with np.errstate(invalid='ignore', divide='ignore'):
      iou = inter / union * (truth.labels == label)
    best = int(np.argmax(iou))
    if iou[best] >= overlap and not taken[best]:
      taken[best] = True
      right += 1
  return np.array([right, len(predicted.labels) - right, (~taken).sum()])


def score_video(
  predicted: np.ndarray,
  truth: np.ndarray,
  background: int | None = None,
  protocol: Protocol = 'exact',
) -> VideoScore:
  """Score one video.

  Args:
    predicted: int [at least L] class of each frame.
    truth: int [L].
    background: class whose segments count for nothing; None for none.
    protocol: see above.

  Raises:
    ValueError: the prediction is shorter than the truth, or a video without
      segments as in `overlap_counts`.
  """
  if len(predicted) < len(truth) or not len(truth):
    raise ValueError(
      f'expected a prediction for each of the {len(truth)} frames (1 or more), '
      f'found {len(predicted)}'
    )
  correct = int((predicted[: len(truth)] == truth).sum())
  if protocol == 'exact':
    predicted = predicted[: len(truth)]
  p, t = (segments(y, background, protocol) for y in (predicted, truth))
  return VideoScore(
    correct,
    len(truth),
    edit_score(p.labels, t.labels, protocol),
    np.stack([overlap_counts(p, t, k / 100, protocol) for k in OVERLAPS]),
  )


def score_split(
  videos: Sequence[VideoScore], listed: int | None = None
) -> dict[str, float]:
  """Return `accuracy`, `edit`, `f1_10`, `f1_25` and `f1_50`, percent.

  Accuracy pools the frames of the split, F1 its segments; the edit score is
  the mean over videos.

  Args:
    videos: their scores.
    listed: videos of the split, where some had no features: as in the
      released code these count as an edit score of 0 and for nothing else.

  Raises:
    ValueError: there is no video.
  """
  if not videos:
    raise ValueError('expected at least one scored video in a split, found 0')
  correct = sum(v.correct for v in videos)
  edit = sum(v.edit for v in videos) / (listed or len(videos))
  out = {
    'accuracy': 100.0 * correct / sum(v.frames for v in videos),
    'edit': edit,
  }
  counts = np.sum([v.counts for v in videos], axis=0)
  for k, (right, wrong, missed) in zip(OVERLAPS, counts, strict=True):
    # 2PR / (P + R); 0 where nothing is right.
    total = 2 * right + wrong + missed
    out[f'f1_{k}'] = 100.0 * 2 * right / total if right else 0.0
  return out


def mean_over_splits(splits: Sequence[Mapping[str, float]]) -> dict[str, float]:
  """Return the mean of each measure over the splits, and the mean F1."""
  out = {k: float(np.mean([s[k] for s in splits])) for k in splits[0]}
  out['f1_mean'] = float(np.mean([out[f'f1_{k}'] for k in OVERLAPS]))
  return out
