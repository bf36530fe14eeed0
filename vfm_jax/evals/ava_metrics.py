"""Score detected actions by frame mAP, as AVA does.

The PASCAL protocol of the official script (AVA v2.2, arXiv:1705.08421).
"""

from collections.abc import Collection, Mapping

import numpy as np

from vfm_jax.evals.ava_data import Frame, FrameBoxes


def frame_map(
  truth: Mapping[Frame, FrameBoxes],
  found: Mapping[Frame, FrameBoxes],
  classes: Collection[int],
  *,
  excluded: Collection[Frame] = (),
  overlap: float = 0.5,
) -> tuple[float, dict[int, float]]:
  """Return the mean average precision, and that of each class with a box.

  Per class, in the order of their scores, a detection is right if the true box
  of its frame that it overlaps most (not another) reaches the overlap and no
  better detection took it.

  Args:
    truth: true boxes.
    found: detections; those without area are left out.
    classes: actions that count; boxes of others are left out.
    excluded: frames that are left out.
    overlap: intersection over union.

  Raises:
    ValueError: no class has a true box.
  """
  left_out = frozenset(excluded)
  precisions = {}
  for action in sorted(classes):
    count = sum(
      int((boxes.actions == action).sum())
      for frame, boxes in truth.items()
      if frame not in left_out
    )
    if not count:
      continue
    right, scores = [np.zeros(0, bool)], [np.zeros(0)]
    for frame, boxes in found.items():
      if frame in left_out:
        continue
      one = _of(boxes, action)
      if not len(one.scores):
        continue
      true = _of(truth[frame], action).boxes if frame in truth else None
      order = np.argsort(one.scores)[::-1]
      right.append(_match(one.boxes[order], true, overlap))
      scores.append(one.scores[order])
    precisions[action] = average_precision(
      np.concatenate(scores), np.concatenate(right), count
    )
  if not precisions:
    raise ValueError(
      f'expected a true box of at least one of {len(classes)} classes, found '
      f'none in {len(truth)} frames'
    )
  return float(np.mean(list(precisions.values()))), precisions


def average_precision(
  scores: np.ndarray, right: np.ndarray, count: int
) -> float:
  """Return the area under the precision made monotone, over all points.

  Args:
    scores: [n].
    right: bool [n], which detections are right.
    count: number of true boxes.
  """
  right = right[np.argsort(scores)[::-1]].astype(float)
  hits = np.cumsum(right)
  precision = hits / np.arange(1, len(hits) + 1)
  # No later point has more: the envelope from the right.
  precision = np.maximum.accumulate(precision[::-1])[::-1]
  return float((precision * right).sum() / count)


def overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Return the intersection over union [N, M] of corners [N, 4], [M, 4]."""
  low = np.maximum(a[:, None, :2], b[None, :, :2])
  high = np.minimum(a[:, None, 2:], b[None, :, 2:])
  inter = np.clip(high - low, 0, None).prod(-1)
  area = [(x[:, 2:] - x[:, :2]).prod(-1) for x in (a, b)]
  return inter / (area[0][:, None] + area[1][None] - inter)


def _of(boxes: FrameBoxes, action: int) -> FrameBoxes:
  x1, y1, x2, y2 = boxes.boxes.T
  keep = (boxes.actions == action) & (x2 > x1) & (y2 > y1)
  return FrameBoxes(*(x[keep] for x in boxes))


def _match(found, true, overlap) -> np.ndarray:
  right = np.zeros(len(found), bool)
  if true is None or not len(true):
    return right
  iou = overlaps(found, true)
  taken = np.zeros(len(true), bool)
  for i, best in enumerate(iou.argmax(1)):
    right[i] = iou[i, best] >= overlap and not taken[best]
    taken[best] |= right[i]
  return right
