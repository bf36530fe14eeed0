"""Turn what a temporal detector says into actions with scores."""

import dataclasses
import io
import json
import pathlib
import pickle
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vfm_jax.evals import nms
from vfm_jax.evals.store import StoreError, read_json
from vfm_jax.models.temporal_localization import Found


class Proposals(NamedTuple):
  """Hold segments of one video.

  Attributes:
    segments: f32 [n, 2] start and end, in steps or seconds.
    scores: f32 [n].
    labels: int [n].
  """

  segments: np.ndarray
  scores: np.ndarray
  labels: np.ndarray

  def take(self, index: np.ndarray) -> 'Proposals':
    """Return the given rows."""
    return Proposals(*(x[index] for x in self))


@dataclasses.dataclass(frozen=True)
class Decoding:
  """Configure how actions are read off and thinned out.

  Attributes:
    per_class: suppress within each class and do not vote, as a detector that
      classifies needs it; otherwise over all classes, then vote.
    soft: lower the scores of what overlaps by exp(-u^2 / sigma); otherwise
      drop it from `iou_threshold` on.
    sigma: see above.
    iou_threshold: see above.
    vote_threshold: overlap from which segments vote; 0 for no vote.
    max_segments: segments a video, and a class, may have.
    min_duration: steps that a segment must be longer than.
    pre_threshold: score that a point must be above.
    pre_topk: points of a level that are looked at.
    min_score: score that must be left after suppression.
  """

  per_class: bool = True
  soft: bool = True
  sigma: float = 0.5
  iou_threshold: float = 0.1
  vote_threshold: float = 0.7
  max_segments: int = 200
  min_duration: float = 0.05
  pre_threshold: float = 0.001
  pre_topk: int = 2000
  min_score: float = 0.001

  def read_off(self, found: Found) -> Proposals:
    """Return the segments that points of one video stand for, in steps.

    Args:
      found: in the video, without a batch axis, see `Found.video`.
    """
    parts = []
    for level, (x, offset, mask) in enumerate(zip(*found, strict=True)):
      x = np.asarray(x, np.float32)
      scores = (_sigmoid(x) * np.asarray(mask)[:, None]).reshape(-1)
      keep = np.flatnonzero(scores > self.pre_threshold)
      keep = keep[np.argsort(-scores[keep], kind='stable')][: self.pre_topk]
      point, label = np.divmod(keep, x.shape[1])
      stride = 2**level
      at = (point * stride).astype(np.float32)
      ends = np.asarray(offset, np.float32)[point] * np.float32(stride)
      segments = np.stack([at - ends[:, 0], at + ends[:, 1]], axis=1)
      part = Proposals(segments, scores[keep], label)
      long = segments[:, 1] - segments[:, 0] > self.min_duration
      parts.append(part.take(long))
    return Proposals(*map(np.concatenate, zip(*parts, strict=True)))

  def thin_out(self, found: Proposals, **vote: Any) -> Proposals:
    """Suppress and, over all classes, vote; the best first.

    Args:
      found: segments of one video.
      **vote: passed on to `nms.vote`.
    """
    if not len(found.scores):
      return found
    if self.per_class:
      parts = [
        self._suppress(found.take(found.labels == label))
        for label in np.unique(found.labels)
      ]
      kept = Proposals(*map(np.concatenate, zip(*parts, strict=True)))
    else:
      kept = self._suppress(found)
      if self.vote_threshold > 0:
        voted = nms.vote(
          kept.segments,
          found.segments,
          found.scores,
          self.vote_threshold,
          **vote,
        )
        kept = kept._replace(segments=voted)
    order = np.argsort(-kept.scores, kind='stable')
    return kept.take(order[: self.max_segments])

  def _suppress(self, found: Proposals) -> Proposals:
    if not self.soft:
      return found.take(
        nms.hard_nms(
          found.segments,
          found.scores,
          threshold=self.iou_threshold,
          min_score=self.min_score,
          count=self.max_segments,
        )
      )
    index, scores = nms.soft_nms(
      found.segments,
      found.scores,
      sigma=self.sigma,
      min_score=self.min_score,
      count=self.max_segments,
    )
    return found.take(index)._replace(scores=scores)


def fuse(
  found: Proposals, classes: np.ndarray, *, topk: int = 2, count: int = 200
) -> Proposals:
  """Give segments of no class the best classes of their video.

  Each of the best `count` segments appears once for each of the `topk` best
  classes, class by class, with the score sqrt(score * probability).

  Args:
    found: segments of one video.
    classes: [C] scores of the video by another classifier; if one is outside
      [0, 1], their softmax is taken.
    topk: classes that are taken.
    count: segments that are taken.
  """
  p = np.asarray(classes, np.float64).reshape(-1)
  if p.min() < 0 or p.max() > 1:
    p = np.exp(p - p.max())
    p = p / p.sum()
  best = np.argsort(-p, kind='stable')[:topk]
  kept = found.take(np.argsort(-found.scores, kind='stable')[:count])
  n = len(kept.scores)
  scores = np.sqrt(p[best][:, None] * kept.scores[None].astype(np.float64))
  return Proposals(
    np.tile(kept.segments, (len(best), 1)),
    scores.reshape(-1),
    np.repeat(best, n),
  )


def read_class_scores(path: str) -> Mapping[str, np.ndarray]:
  """Read the scores of a classifier: {video: f64 [C]}.

  Args:
    path: a json {video: [C numbers]}, or a pickle of {video: array} as is
      passed on for THUMOS14. A pickle may hold arrays only.

  Raises:
    StoreError: the file is missing or holds something else.
  """
  file = pathlib.Path(path)
  if file.suffix == '.json':
    table = read_json(file)
  else:
    try:
      table = _ArraysOnly(io.BytesIO(file.read_bytes())).load()
    except (OSError, EOFError, pickle.UnpicklingError) as e:
      raise StoreError(f'{path}: unreadable class scores: {e}') from e
  if not isinstance(table, dict) or not table:
    raise StoreError(f'{path}: expected {{video: scores}}')
  out = {}
  for video, scores in table.items():
    try:
      out[video] = np.asarray(scores, np.float64).reshape(-1)
    except (TypeError, ValueError) as e:
      raise StoreError(f'{path}: scores of {video!r} are no numbers') from e
    if not out[video].size or not np.isfinite(out[video]).all():
      raise StoreError(f'{path}: scores of {video!r} are empty or not finite')
  return out


def to_json(
  found: Mapping[str, Proposals], classes: Sequence[str], version: str
) -> bytes:
  """Return the file of results of the ActivityNet challenge.

  {"version": ..., "results": {video: [{"label": name, "score": s, "segment":
  [start s, end s]}]}, "external_data": {}}
  """
  results = {
    video: [
      {
        'label': classes[label],
        'score': round(float(score), 6),
        'segment': [round(float(t), 4) for t in segment],
      }
      for segment, score, label in zip(*of_video, strict=True)
    ]
    for video, of_video in found.items()
  }
  content = {'version': version, 'results': results, 'external_data': {}}
  return json.dumps(content).encode()


class _ArraysOnly(pickle.Unpickler):
  """Load numpy arrays and plain containers, and run nothing."""

  def find_class(self, module: str, name: str) -> Any:
    allowed = {
      ('numpy', 'ndarray'),
      ('numpy', 'dtype'),
      ('numpy.core.multiarray', '_reconstruct'),
      ('numpy._core.multiarray', '_reconstruct'),
      ('numpy.core.multiarray', 'scalar'),
      ('numpy._core.multiarray', 'scalar'),
      ('numpy._core.numeric', '_frombuffer'),
      ('numpy.core.numeric', '_frombuffer'),
      ('_codecs', 'encode'),
      ('collections', 'OrderedDict'),
    }
    if (module, name) not in allowed:
      raise pickle.UnpicklingError(f'{module}.{name} is no array')
    return super().find_class(module, name)


def _sigmoid(x: np.ndarray) -> np.ndarray:
  with np.errstate(over='ignore'):
    return (1 / (1 + np.exp(-x))).astype(np.float32)
