"""Decode encoded video files with PyAV, exactly and only what is asked for.

Opening a file walks its packets once, without decoding, and keeps the
presentation time of every frame and the place of every key frame. A read then
seeks to the key frame in front of each wanted frame, decodes from there, and
recognises frames by their time stamp. This holds for B-frames, open GOPs and
variable frame rates. Where packets don't tell the frames (no time stamps, or
packets that show nothing), the file is decoded from its start instead.
"""

import dataclasses
import functools
import io
import os
import pathlib
from typing import Any, Literal

import numpy as np

from vfm_jax.data import video

# Decoding on is cheaper than a seek, which also throws away the frames that
# are in the decoder, when the next key frame is this close.
_SEEK_GAIN = 12
# Packets of these hold hidden reference frames, so they don't count frames.
_HIDDEN_FRAMES = ('vp8',)
# Decoders that skip non-reference frames without touching the others.
_SKIPS_NONREF = ('h264', 'hevc')


@dataclasses.dataclass(frozen=True)
class _Index:
  """Where the frames of a file are.

  Attributes:
    pts: int64 [N] presentation times in stream units, ascending; None when
      frames have to be counted from the start.
    keys: int64 [K] frame numbers of the key frames, ascending.
    seeks: int64 [K] time stamps that lead the demuxer to each of them.
  """

  num_frames: int
  fps: float
  height: int
  width: int
  pts: np.ndarray | None
  keys: np.ndarray
  seeks: np.ndarray


class PyAVReader(video.Reader):
  """Read a video file; rotation flags are not applied.

  Args:
    file: path of the file.
    threads: decoder threads; 1 is right under many workers.
    thread_type: how the decoder divides its work over threads.
  """

  def __init__(
    self,
    file: str | pathlib.Path,
    threads: int = 1,
    thread_type: Literal['AUTO', 'FRAME', 'SLICE'] = 'AUTO',
  ):
    name = os.fspath(file)
    try:
      stat = os.stat(name)
    except OSError as e:
      raise video.DecodeError(name, f'missing: {e.strerror}') from e
    if not stat.st_size:
      raise video.DecodeError(name, 'empty: the file has 0 bytes')
    self._start(name, name, threads, thread_type)
    self._describe(_cached_index(name, stat.st_size, stat.st_mtime_ns))

  def _start(
    self, name: str, file: str | bytes, threads: int, thread_type: str
  ) -> None:
    """Set what both kinds of files need; nothing is opened."""
    self._name = name
    self._file = file
    self._threads = threads
    self._thread_type = thread_type
    self._container: Any = None

  def _describe(self, index: _Index) -> None:
    self._index = index
    self.num_frames = index.num_frames
    self.fps = index.fps
    self.height = index.height
    self.width = index.width

  def close(self) -> None:
    """Close the file; a later read opens it again."""
    if self._container is not None:
      self._container.close()
      self._container = None

  def read(self, indices: np.ndarray) -> np.ndarray:
    """Return uint8 [n, H, W, 3] frames; see `Reader`."""
    import av.error

    indices = self.checked(indices).tolist()
    unique = sorted(set(indices))

    frames: dict[int, np.ndarray] = {}
    try:
      if self._index.pts is not None:
        for key, wanted in self._groups(unique):
          self._decode(wanted, frames, key)
      missing = [i for i in unique if i not in frames]
      if missing:
        # Not an ordinary file, or a seek that landed late: from the start.
        self.close()
        self._decode(missing, frames, None)
    except av.error.FFmpegError as e:
      raise video.DecodeError(self._name, f'corrupt: {e}') from e
    for i in unique:
      if i not in frames:
        raise video.DecodeError(
          self._name,
          f'frame {i} of {self.num_frames} does not decode (truncated or '
          'corrupt data)',
        )
    return np.stack([frames[i] for i in indices])

  def _groups(self, wanted: list[int]) -> list[tuple[int, list[int]]]:
    """Cut ascending frames into runs that share one seek: (key, frames)."""
    groups: list[tuple[int, list[int]]] = []
    keys = np.searchsorted(self._index.keys, wanted, side='right') - 1
    for i, key in zip(wanted, keys, strict=True):
      near = groups and (
        self._index.keys[key] - groups[-1][1][-1] <= _SEEK_GAIN
      )
      if near:
        groups[-1][1].append(i)
      else:
        groups.append((key, [i]))
    return groups

  def _decode(self, wanted: list[int], frames: dict, key: int | None) -> None:
    """Decode the wanted frames from a key frame, or from the start of all."""
    fresh = self._container is None
    if fresh:
      self._container = _open(self._file, self._name)
    stream = self._container.streams.video[0]
    context = stream.codec_context
    if fresh:
      context.thread_count = self._threads
      context.thread_type = self._thread_type if self._threads > 1 else 'NONE'
    index = self._index
    if key is not None and not (fresh and key == 0):
      self._container.seek(int(index.seeks[key]), stream=stream, backward=True)
    by_pts = index.pts is not None
    times = index.pts if index.pts is not None else range(index.num_frames)
    left = {int(times[i]): i for i in wanted}
    skips = key is not None and context.name in _SKIPS_NONREF
    count = 0
    for packet in self._container.demux(stream):
      if skips:
        seen = packet.pts is None or packet.pts in left
        context.skip_frame = 'DEFAULT' if seen else 'NONREF'
      for frame in context.decode(packet if packet.size else None):
        i = left.pop(frame.pts if by_pts else count, None)
        count += 1
        if i is not None:
          frames[i] = frame.to_ndarray(
            format='rgb24', width=self.width, height=self.height
          )
        if not left:
          return


class EncodedReader(PyAVReader):
  """Read an encoded video that is in memory as bytes."""

  def __init__(self, data: bytes, name: str, threads: int = 1):
    if not data:
      raise video.DecodeError(name, 'empty: 0 bytes of video')
    self._start(name, data, threads, 'AUTO')
    self._describe(_index(data, name))


def _open(file: str | bytes, name: str):
  """Open a container, or say why it is no video."""
  import av.error

  try:
    container = av.open(
      io.BytesIO(file) if isinstance(file, bytes) else file, 'r'
    )
  except av.error.FFmpegError as e:
    raise video.DecodeError(
      name, f'not a video, or truncated before its index: {e}'
    ) from e
  if not container.streams.video:
    kinds = {s.type for s in container.streams}
    container.close()
    raise video.DecodeError(
      name,
      'no video stream: the file holds audio only'
      if 'audio' in kinds
      else 'no video stream: not a video, or truncated inside its index',
    )
  return container


@functools.lru_cache(4096)
def _cached_index(path: str, size: int, mtime_ns: int) -> _Index:
  """Index a file once; its size and time tell when it has changed."""
  del size, mtime_ns
  return _index(path, path)


def _index(file: str | bytes, name: str) -> _Index:
  """Walk the packets of a file; decode it where they don't tell the frames."""
  import av.error

  with _open(file, name) as container:
    stream = container.streams.video[0]
    try:
      packets = [
        (p.pts, p.dts, p.is_keyframe, p.is_discard)
        for p in container.demux(stream)
        if p.size
      ]
    except av.error.FFmpegError as e:
      raise video.DecodeError(name, f'truncated or corrupt: {e}') from e
    promised = stream.frames if 'mp4' in container.format.name else 0
    if len(packets) < promised:
      raise video.DecodeError(
        name,
        f'truncated: its header promises {promised} frames, '
        f'{len(packets)} are there',
      )
    height, width = stream.codec_context.height, stream.codec_context.width
    shown = [p for p in packets if not p[3]]
    pts = [p[0] for p in shown]
    trusted = (
      None not in pts
      and len(set(pts)) == len(pts)
      and stream.codec_context.name not in _HIDDEN_FRAMES
      and any(p[2] for p in shown)
    )
    num_frames = len(pts) if trusted else _count(file, name)
    if not num_frames:
      raise video.DecodeError(name, 'zero frames in the video stream')
    if not (height and width):
      raise video.DecodeError(name, 'corrupt: the frames have no size')
    rate = stream.average_rate or stream.guessed_rate
    # A lone frame may come without a rate; it counts as one second.
    fps = float(rate) if rate else 1.0
  if not trusted:
    none = np.zeros(0, np.int64)
    return _Index(num_frames, fps, height, width, None, none, none)
  times = np.sort(np.asarray(pts, np.int64))
  # A decoder can only start at a key frame that is itself shown or not: keep
  # discarded ones too, they lead into the first shown frames.
  keys = sorted(
    (int(np.searchsorted(times, p)), p if d is None else d)
    for p, d, key, _ in packets
    if key and p is not None
  )
  at = np.asarray([k for k, _ in keys], np.int64)
  seeks = np.asarray([s for _, s in keys], np.int64)
  # Frames in front of the first key frame are decoded from it as well.
  at[0] = 0
  return _Index(num_frames, fps, height, width, times, at, seeks)


def _count(file: str | bytes, name: str) -> int:
  """Count the frames that decoding gives."""
  import av.error

  with _open(file, name) as container:
    try:
      return sum(1 for _ in container.decode(video=0))
    except av.error.FFmpegError as e:
      raise video.DecodeError(name, f'truncated or corrupt: {e}') from e
