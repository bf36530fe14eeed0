"""Make moving shapes: labelled clips without any file.

A shape of one colour moves over a fixed noise background at constant speed and
wraps around. The shape can be told from one frame, the direction can not: the
two labels separate appearance from motion.
"""

import dataclasses
import functools

import numpy as np

from vfm_jax.data import sources, video

SHAPES = ('square', 'circle', 'triangle', 'cross')


@dataclasses.dataclass(frozen=True)
class MovingShapes:
  """Draw example `index` from (seed, index) alone.

  Labels: `shape` and `direction` (0 is to the right, then clockwise on the
  screen). Both are balanced: shape = index mod 4, direction = index // 4 mod
  `directions`.

  Attributes:
    count: number of examples; any number, nothing is stored.
    frames: frames a video.
    size: height and width, pixels.
    directions: 4 or 8.
    speed: range of the speed, pixels a frame.
    noise: standard deviation of the background, grey levels.
    fps: frame rate to report.
    seed: other seeds give other examples, for example for validation.
  """

  count: int = 10_000
  frames: int = 16
  size: int = 64
  directions: int = 8
  speed: tuple[float, float] = (1.0, 3.0)
  noise: float = 16.0
  fps: float = 16.0
  seed: int = 0

  def __post_init__(self):
    if self.directions not in (4, 8):
      raise ValueError(
        f'data.source.directions: must be 4 or 8, got {self.directions}'
      )

  @property
  def label_names(self) -> tuple[str, ...]:
    """Names of the labels."""
    return ('shape', 'direction')

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> video.Video:
    sources.check_index(index, self.count)
    labels = {
      'shape': index % len(SHAPES),
      'direction': index // len(SHAPES) % self.directions,
    }
    return video.Video(
      f'shapes/{self.seed}/{index}',
      labels,
      functools.partial(_open, self, index, **labels),
    )


def _open(
  source: MovingShapes, index: int, shape: int, direction: int
) -> video.Reader:
  """Draw the frames of one example."""
  rng = np.random.default_rng(np.random.SeedSequence([source.seed, index]))
  size = source.size
  background = 96 + source.noise * rng.standard_normal((size, size, 3))
  colour = rng.uniform(150, 255, 3) * rng.permutation([1.0, 1.0, 0.4])
  radius = rng.uniform(0.12, 0.2) * size
  angle = 2 * np.pi * direction / source.directions
  velocity = rng.uniform(*source.speed) * np.array(
    [np.sin(angle), np.cos(angle)]
  )
  start = rng.uniform(0, size, 2)
  grid = np.arange(size)
  frames = np.empty((source.frames, size, size, 3), np.uint8)
  for t in range(source.frames):
    y, x = start + t * velocity
    # Distance on a torus: what leaves at one side enters at the other.
    dy = (grid - y + size / 2) % size - size / 2
    dx = (grid - x + size / 2) % size - size / 2
    mask = _inside(shape, dy[:, None] / radius, dx[None, :] / radius)
    frames[t] = np.clip(np.where(mask[..., None], colour, background), 0, 255)
  return video.ArrayReader(frames, source.fps)


def _inside(shape: int, y: np.ndarray, x: np.ndarray) -> np.ndarray:
  """Return bool [H, W], True inside a shape of unit radius at the origin."""
  match SHAPES[shape]:
    case 'square':
      return np.maximum(abs(y), abs(x)) < 0.85
    case 'circle':
      return y**2 + x**2 < 1
    case 'triangle':
      return (y < 0.8) & (abs(x) < (y + 1) * 0.6)
    case _:
      arm = np.minimum(abs(y), abs(x)) < 0.35
      return arm & (np.maximum(abs(y), abs(x)) < 1)
