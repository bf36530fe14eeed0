"""Cut a film into parts whose shots are annotated, to test temporal heads on.

    python -m vfm_jax.data.shots FILM FOLDER

FOLDER then holds small videos (`videos/part_000.mp4`), lists of them for
`FolderCSV` (`train.csv`, `val.csv`, `all.csv`), the shots as segments in the
layout of ActivityNet (`shots.json`), and frames near to a cut against all
others in the layout of 50Salads (`cuts`). Labels come from the pixels alone: no
one has to name anything, and any film will do. Ours.
"""

import argparse
import itertools
import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

# Frames on both sides that a change must stand out from, and how far.
_AROUND, _FACTOR, _LEAST = 12, 3.0, 0.12
_LEVELS = 8


class Part(NamedTuple):
  """Hold a part of a film.

  Attributes:
    name: of its file, without suffix.
    start: first frame in the film.
    stop: one past its last frame.
    cuts: frames of the part that begin a shot, ascending, from 1.
  """

  name: str
  start: int
  stop: int
  cuts: tuple[int, ...]

  def shots(self) -> list[tuple[int, int]]:
    """Return first frame and one past the last of each shot in the part."""
    ends = (0, *self.cuts, self.stop - self.start)
    return list(itertools.pairwise(ends))

  def near_cut(self, reach: int) -> np.ndarray:
    """Return bool [F], True for the `reach` frames on each side of a cut."""
    near = np.zeros(self.stop - self.start, bool)
    for cut in self.cuts:
      near[max(cut - reach, 0) : cut + reach] = True
    return near


def changes(frames: Sequence[np.ndarray] | Iterator[np.ndarray]) -> np.ndarray:
  """Return how much of its colour each frame changes, f64 [F] in [0, 1].

  Half the L1 distance of the joint histogram (8 levels a channel) to that of
  the frame before: 0 for the same colours, 1 for none in common.

  Args:
    frames: uint8 [H, W, 3] each.
  """
  weights = np.array([_LEVELS**2, _LEVELS, 1])
  found, last = [], None
  for frame in frames:
    level = (frame.reshape(-1, 3) // (256 // _LEVELS)) @ weights
    histogram = np.bincount(level, minlength=_LEVELS**3) / len(level)
    previous = histogram if last is None else last
    found.append(np.abs(histogram - previous).sum() / 2)
    last = histogram
  return np.array(found)


def find_cuts(change: np.ndarray) -> np.ndarray:
  """Return the frames that begin a shot, int [n], ascending.

  A cut changes more than 0.12 of the colour, is the largest change within 12
  frames on both sides, and three times the mean of the others there. Slow
  fades and dissolves are not found.

  Args:
    change: f64 [F] from `changes`.
  """
  cuts = []
  for i in np.flatnonzero(change > _LEAST):
    around = change[max(i - _AROUND, 0) : i + _AROUND + 1]
    others = (around.sum() - change[i]) / max(len(around) - 1, 1)
    if change[i] >= around.max() and change[i] > _FACTOR * others:
      cuts.append(i)
  return np.array(cuts, int)


def divide(cuts: np.ndarray, num_frames: int, length: int) -> list[Part]:
  """Return parts of `length` frames; what is left at the end is dropped.

  Raises:
    ValueError: the film is shorter than a part.
  """
  count = num_frames // length
  if not count:
    raise ValueError(
      f'expected a film of at least one part of {length} frames, found '
      f'{num_frames} frames; lower --seconds'
    )
  parts = []
  for i in range(count):
    start, stop = i * length, (i + 1) * length
    inside = cuts[(cuts > start) & (cuts < stop)] - start
    parts.append(
      Part(f'part_{i:03d}', start, stop, tuple(int(c) for c in inside))
    )
  return parts


def validation(count: int, share: float) -> set[int]:
  """Return the numbers of the parts for validation, spread over the film.

  Raises:
    ValueError: training or validation would have no part.
  """
  wanted = math.ceil(count * share)
  if not 0 < wanted < count:
    raise ValueError(
      f'expected parts for training and for validation, found {count} parts, '
      f'{wanted} of them for validation; change --seconds or --val'
    )
  return {int((i + 0.5) * count / wanted) for i in range(wanted)}


def annotate(
  parts: Sequence[Part],
  val: set[int],
  folder: pathlib.Path,
  *,
  fps: float,
  reach: float,
) -> None:
  """Write the lists and annotations of the parts.

  Args:
    parts: of one film.
    val: numbers of those for validation.
    folder: where to.
    fps: frames a second.
    reach: seconds on each side of a cut that count as near to it.
  """
  database = {}
  cuts = folder / 'cuts'
  for name in ('groundTruth', 'splits'):
    (cuts / name).mkdir(parents=True, exist_ok=True)
  (cuts / 'mapping.txt').write_text('0 shot\n1 cut\n')
  listed: dict[str, list[str]] = {'train': [], 'val': []}
  for i, part in enumerate(parts):
    split = 'val' if i in val else 'train'
    listed[split].append(part.name)
    database[part.name] = {
      'subset': {'train': 'training', 'val': 'validation'}[split],
      'duration': (part.stop - part.start) / fps,
      'annotations': [
        {'segment': [a / fps, b / fps], 'label': 'shot'}
        for a, b in part.shots()
      ],
    }
    names = np.where(part.near_cut(round(reach * fps)), 'cut', 'shot')
    text = '\n'.join(names) + '\n'
    (cuts / 'groundTruth' / f'{part.name}.txt').write_text(text)
  for split, bundle in (('train', 'train'), ('val', 'test')):
    text = ''.join(f'{name}.txt\n' for name in listed[split])
    (cuts / 'splits' / f'{bundle}.split1.bundle').write_text(text)
  for split, names in {**listed, 'all': [p.name for p in parts]}.items():
    rows = ''.join(f'{name}.mp4\n' for name in names)
    (folder / f'{split}.csv').write_text('path\n' + rows)
  (folder / 'shots.json').write_text(json.dumps({'database': database}))


def prepare(
  film: str,
  folder: str,
  *,
  seconds: float = 20.0,
  val: float = 0.25,
  height: int = 72,
  reach: float = 0.25,
) -> list[Part]:
  """Cut a film into parts and annotate them.

  Args:
    film: video file.
    folder: where to write; see the docstring of the module.
    seconds: length of a part.
    val: share of the parts for validation.
    height: of the parts, pixels; the width keeps the shape of the picture.
    reach: seconds on each side of a cut that count as near to it.

  Returns:
    The parts, validation included.

  Raises:
    ValueError: the film is too short for two parts.
  """
  import av

  with av.open(film) as source:
    stream = source.streams.video[0]
    fps = Fraction(stream.average_rate or 25)
    # Encoders take even sizes.
    width = 2 * round(height * stream.width / stream.height / 2)
    small = [
      f.reformat(width, height, 'rgb24').to_ndarray()
      for f in source.decode(stream)
    ]
  parts = divide(find_cuts(changes(small)), len(small), round(seconds * fps))
  chosen = validation(len(parts), val)
  videos = pathlib.Path(folder, 'videos')
  videos.mkdir(parents=True, exist_ok=True)
  for part in parts:
    with av.open(str(videos / f'{part.name}.mp4'), 'w') as out:
      stream = out.add_stream('libx264', rate=fps, options={'crf': '18'})
      stream.width, stream.height, stream.pix_fmt = width, height, 'yuv420p'
      for frame in small[part.start : part.stop]:
        out.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
      out.mux(stream.encode())
  annotate(parts, chosen, pathlib.Path(folder), fps=float(fps), reach=reach)
  return parts


def main() -> None:
  """Prepare the film of the command line."""
  parser = argparse.ArgumentParser(description='Cut a film into parts.')
  parser.add_argument('film', help='video file')
  parser.add_argument('folder', help='where to write')
  parser.add_argument('--seconds', type=float, default=20.0)
  parser.add_argument('--val', type=float, default=0.25)
  parser.add_argument('--height', type=int, default=72)
  args = parser.parse_args()
  parts = prepare(
    args.film,
    args.folder,
    seconds=args.seconds,
    val=args.val,
    height=args.height,
  )
  print(f'{len(parts)} parts, {sum(len(p.cuts) for p in parts)} cuts')


if __name__ == '__main__':
  main()
