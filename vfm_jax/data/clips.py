"""Choose which frames of a video make a clip.

Every sampler is `fn(num_frames, fps, rng)` and returns frame indices from 0:
int64 [T] for one clip, [M, T] for several, or `Clips` where the time spans are
part of the result. Samplers keep the conventions of the systems they are named
after, quirks included, so that published numbers can be compared.
"""

from typing import NamedTuple

import numpy as np


class Clips(NamedTuple):
  """Hold clips of one video and the time that each stands for.

  Attributes:
    indices: int64 [M, T] frame indices.
    spans: float64 [M, 2] start and end, seconds.
  """

  indices: np.ndarray
  spans: np.ndarray


def as_clips(sampled: np.ndarray | Clips, fps: float) -> Clips:
  """Return any sampler's result as `Clips`.

  Without spans of its own, a clip spans from its first frame to the end of its
  last one.
  """
  if isinstance(sampled, Clips):
    return sampled
  indices = np.atleast_2d(sampled)
  spans = np.stack([indices.min(1), indices.max(1) + 1], 1) / fps
  return Clips(indices, spans)


def uniform(
  num_frames: int, fps: float, rng: np.random.Generator, *, frames: int = 16
) -> np.ndarray:
  """Spread `frames` indices over the whole video, symmetric in time.

  The positions are i (n - 1) / (N - 1), rounded in the first half and mirrored
  in the second; a shorter video repeats frames. TWLV-I report
  (arXiv:2408.11318).

  Returns:
    int64 [frames], ascending.
  """
  del fps, rng
  return _spread(num_frames, frames)


def _spread(num_frames: int, frames: int) -> np.ndarray:
  half = frames // 2
  step = (num_frames - 1) / max(frames - 1, 1)
  first = np.floor(np.arange(half) * step + 0.5).astype(np.int64)
  middle = [(num_frames - 1) // 2] * (frames % 2)
  return np.concatenate(
    [first, np.asarray(middle, np.int64), num_frames - 1 - first[::-1]]
  )


def multi_clip(
  num_frames: int,
  fps: float,
  rng: np.random.Generator,
  *,
  frames: int = 16,
  window: float = 2.0,
  stride: float | None = None,
) -> Clips:
  """Cut the video into windows and spread `frames` indices over each.

  Window k covers [k s, k s + w] seconds, k < floor((d - w) / s) + 1 for a video
  of d seconds. A video shorter than a window is one window, of its length.
  TWLV-I report (arXiv:2408.11318); w = 2 s there for recognition.

  Args:
    num_frames: frames in the video.
    fps: frames a second.
    rng: unused.
    frames: frames a window.
    window: length w of a window, seconds.
    stride: distance s of window starts, seconds; None is `window`.

  Returns:
    Clips of indices [M, frames] and spans [M, 2].
  """
  del rng
  stride = window if stride is None else stride
  duration = num_frames / fps
  # The slack keeps a video of exactly k windows from losing its last one.
  count = max(int(np.floor((duration - window) / stride + 1e-6)) + 1, 1)
  starts = np.arange(count) * stride
  spans = np.stack([starts, np.minimum(starts + window, duration)], 1)
  rows = []
  for start, end in spans:
    low = min(round(start * fps), num_frames - 1)
    high = max(min(round(end * fps), num_frames), low + 1)
    rows.append(low + _spread(high - low, frames))
  return Clips(np.stack(rows), spans)


def videomae_pretrain(
  num_frames: int,
  fps: float,
  rng: np.random.Generator,
  *,
  frames: int = 16,
  stride: int = 4,
) -> np.ndarray:
  """Take one window at a random start, as VideoMAE's pretraining loader does.

  The window is `frames * stride` long; the start is uniform over the places
  where it fits, else 0. The position advances by the stride only while its
  1-based value plus the stride is below n; after that one frame repeats.

  Returns:
    int64 [frames].
  """
  del fps
  length = frames * stride
  start = int(rng.integers(0, max(num_frames - length, 0) + 1))
  # 1-based position p advances while p + stride < n, so 0-based positions
  # never pass the last one before n - 1 that the stride reaches.
  steps = max((num_frames - 2 - start) // stride, 0)
  return start + stride * np.minimum(np.arange(frames), steps).astype(np.int64)


def videomae_dense_train(
  num_frames: int,
  fps: float,
  rng: np.random.Generator,
  *,
  frames: int = 16,
  stride: int = 4,
) -> np.ndarray:
  """Take one dense window, as VideoMAE's Kinetics fine-tuning does.

  With L = frames * stride and n > L, the window ends at a random e in [L, n)
  and the indices are `linspace(e - L, e, frames)` with its end point, clipped
  to e - 1 and truncated: a true step of L / (frames - 1). Shorter videos give
  `linspace(0, n, n // stride)`, then n, clipped to n - 1.

  Returns:
    int64 [frames].
  """
  del fps
  length = frames * stride
  if num_frames > length:
    end = int(rng.integers(length, num_frames))
    points = np.linspace(end - length, end, frames)
    return np.clip(points, end - length, end - 1).astype(np.int64)
  points = np.linspace(0, num_frames, num_frames // stride)
  points = np.pad(points, (0, frames - len(points)), constant_values=num_frames)
  return np.clip(points, 0, num_frames - 1).astype(np.int64)


def videomae_dense_test(
  num_frames: int,
  fps: float,
  rng: np.random.Generator,
  *,
  frames: int = 16,
  stride: int = 4,
  clips: int = 5,
) -> np.ndarray:
  """Take evenly placed dense clips, as VideoMAE's Kinetics test does.

  Every `stride`-th frame is listed and the list padded with its last entry to
  `frames`; clip k starts at entry floor(k (M - frames) / (clips - 1)).

  Returns:
    int64 [clips, frames].
  """
  del fps, rng
  listed = np.arange(0, num_frames, stride, dtype=np.int64)
  listed = np.pad(listed, (0, max(frames - len(listed), 0)), mode='edge')
  step = max((len(listed) - frames) / max(clips - 1, 1), 0)
  starts = np.asarray([int(k * step) for k in range(clips)], np.int64)
  return listed[starts[:, None] + np.arange(frames)]


def segment_train(
  num_frames: int, fps: float, rng: np.random.Generator, *, frames: int = 16
) -> np.ndarray:
  """Take one random frame from each of `frames` equal segments (SSv2, TSN).

  Segments are n // frames long; a video of fewer frames repeats frame 0.

  Returns:
    int64 [frames], ascending.
  """
  del fps
  length = num_frames // frames
  if not length:
    return np.zeros(frames, np.int64)
  return np.arange(frames) * length + rng.integers(0, length, frames)


def umt_train(
  num_frames: int, fps: float, rng: np.random.Generator, *, frames: int = 8
) -> np.ndarray:
  """Take one random frame from each of `frames` equal segments (UMT).

  With s = n / frames, frame i is uniform in [round(i s), round((i + 1) s)),
  halves to even, and at least the first of those; none is past the last frame.

  Returns:
    int64 [frames], ascending.
  """
  del fps
  edges = np.round(np.arange(frames + 1) * num_frames / frames)
  edges = edges.astype(np.int64)
  chosen = rng.integers(edges[:-1], np.maximum(edges[1:], edges[:-1] + 1))
  return np.minimum(chosen, num_frames - 1)


def vjepa_train(
  num_frames: int,
  fps: float,
  rng: np.random.Generator,
  *,
  frames: int = 16,
  stride: int = 4,
  rate: int | None = None,
) -> np.ndarray:
  """Spread `frames` indices over a random window (V-JEPA, V-JEPA 2).

  A window of w = frames * stride frames holds both of its ends: the positions
  are s + i w / (frames - 1), rounded down, and the last, which is past the
  window, becomes the last frame of it: the true step is above the stride. A
  video of at most w frames is spread over in steps of about the stride, and
  its last frame is repeated.

  Args:
    num_frames: frames in the video, n.
    fps: frames a second, for `rate`.
    rng: places the window.
    frames: frames of the clip.
    stride: frames of the video for one of the clip.
    rate: frames a second of the clip, instead: the stride is ceil(fps) // rate,
      at least 1 (V-JEPA 2).

  Returns:
    int64 [frames], ascending.
  """
  if rate is not None:
    stride = max(int(np.ceil(fps)) // rate, 1)
  window = frames * stride
  if num_frames > window:
    start = int(rng.integers(window, num_frames)) - window
    spread = np.linspace(start, start + window, frames)
    return np.minimum(spread, start + window - 1).astype(np.int64)
  count = num_frames // stride
  spread = np.linspace(0, num_frames, count)
  rest = np.full(frames - count, num_frames)
  indices = np.concatenate([spread, rest])
  return np.minimum(indices, num_frames - 1).astype(np.int64)


def segment_test(
  num_frames: int,
  fps: float,
  rng: np.random.Generator,
  *,
  frames: int = 16,
  clips: int = 2,
) -> np.ndarray:
  """Take interleaved clips over the whole video (SSv2 test of VideoMAE).

  With t = n / frames, the indices floor(t j / clips + t i) of all clips j and
  frames i are sorted; clip k takes every `clips`-th, from entry k.

  Returns:
    int64 [clips, frames].
  """
  del fps, rng
  tick = num_frames / frames
  offsets = tick * np.arange(clips)[:, None] / clips
  points = np.sort((offsets + tick * np.arange(frames)).astype(np.int64), None)
  return points.reshape(frames, clips).T
