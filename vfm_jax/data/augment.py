"""Crop, resize and flip clips, the same way for all frames of a clip.

Every transform is `fn(frames, rng)`: frames uint8 [T, H, W, 3] in, uint8
[T, h, w, 3] out; `three_crops` gives [S, T, h, w, 3]. Crops come before the
resize, so that only kept pixels are resized. Resizing is Pillow's bilinear,
which widens its filter when it shrinks (antialias), as in the official
VideoMAE loaders.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

Transform = Callable[[np.ndarray, np.random.Generator], np.ndarray]

# Crop sides of VideoMAE, as parts of the short side.
_SCALES = (1.0, 0.875, 0.75, 0.66)
# Crop places (x, y) of VideoMAE, in quarters of the free space: corners and
# centre, edge centres, and the four quarter points.
_PLACES = (
  (0, 0), (4, 0), (0, 4), (4, 4), (2, 2),
  (0, 2), (4, 2), (2, 4), (2, 0),
  (1, 1), (3, 1), (1, 3), (3, 3),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Compose:
  """Apply transforms one after the other, all with the same generator."""

  transforms: tuple[Callable, ...]

  def __call__(
    self, frames: np.ndarray, rng: np.random.Generator
  ) -> np.ndarray:
    """Return the transformed frames."""
    for transform in self.transforms:
      frames = transform(frames, rng)
    return frames


def identity(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Return the frames as they are."""
  del rng
  return frames


def resize(frames: np.ndarray, height: int, width: int) -> np.ndarray:
  """Resize frames [T, H, W, 3] to [T, height, width, 3], bilinear."""
  import PIL.Image

  if frames.shape[1:3] == (height, width):
    return frames
  out = np.empty((len(frames), height, width, 3), np.uint8)
  for t, frame in enumerate(frames):
    image = PIL.Image.fromarray(frame)
    image = image.resize((width, height), PIL.Image.Resampling.BILINEAR)
    out[t] = np.asarray(image)
  return out


def resize_short_side(
  frames: np.ndarray, rng: np.random.Generator, *, size: int = 224
) -> np.ndarray:
  """Resize so that the short side is `size`, keeping the aspect."""
  del rng
  height, width = frames.shape[1:3]
  scale = size / min(height, width)
  return resize(
    frames,
    size if height <= width else round(height * scale),
    size if width <= height else round(width * scale),
  )


def multi_scale_crop(
  frames: np.ndarray,
  rng: np.random.Generator,
  *,
  size: int = 224,
  scales: tuple[float, ...] = _SCALES,
) -> np.ndarray:
  """Crop one of VideoMAE's boxes and resize to [T, size, size, 3].

  Height and width of the box are each the short side times a scale, with
  neighbouring scales at most; a side within 2 pixels of `size` becomes `size`.
  The box lies at one of 13 fixed places. No flip.
  """
  height, width = frames.shape[1:3]
  short = min(height, width)
  sides = [int(short * s) for s in scales]
  sides = [
    size if abs(s - size) < 3 and size <= short else max(s, 1) for s in sides
  ]
  pairs = [
    (h, w)
    for i, h in enumerate(sides)
    for j, w in enumerate(sides)
    if abs(i - j) <= 1
  ]
  h, w = pairs[rng.integers(len(pairs))]
  x, y = _PLACES[rng.integers(len(_PLACES))]
  top, left = y * ((height - h) // 4), x * ((width - w) // 4)
  return resize(frames[:, top : top + h, left : left + w], size, size)


def random_resized_crop(
  frames: np.ndarray,
  rng: np.random.Generator,
  *,
  size: int = 224,
  scale: tuple[float, float] = (0.08, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
  """Crop a random box, the same for all frames, and resize it to `size`.

  The area is uniform in `scale`, the aspect (width / height) log-uniform in
  `ratio`; after ten boxes that don't fit, the largest centred box with an
  allowed aspect is taken. Inception-style crop, as in torchvision.
  """
  height, width = frames.shape[1:3]
  top, left, h, w = _random_box(height, width, rng, scale, ratio)
  return resize(frames[:, top : top + h, left : left + w], size, size)


def _random_box(height, width, rng, scale, ratio):
  """Return (top, left, height, width) of an Inception-style crop."""
  for _ in range(10):
    area = height * width * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      top = int(rng.integers(0, height - h + 1))
      left = int(rng.integers(0, width - w + 1))
      return top, left, h, w
  w = min(width, max(round(height * ratio[1]), 1))
  h = min(height, max(round(width / ratio[0]), 1))
  return (height - h) // 2, (width - w) // 2, h, w


def center_crop(
  frames: np.ndarray, rng: np.random.Generator, *, size: int = 224
) -> np.ndarray:
  """Crop the centre square of the short side and resize it to `size`.

  The same picture as resizing the short side first, with fewer pixels resized.
  """
  del rng
  height, width = frames.shape[1:3]
  side = min(height, width)
  top, left = (height - side) // 2, (width - side) // 2
  return resize(frames[:, top : top + side, left : left + side], size, size)


def three_crops(
  frames: np.ndarray,
  rng: np.random.Generator,
  *,
  size: int = 224,
  crops: int = 3,
) -> np.ndarray:
  """Resize the short side and cut squares evenly along the long side.

  Crop j starts at floor(j (long - size) / (crops - 1)); one crop is centred.

  Returns:
    uint8 [crops, T, size, size, 3].
  """
  frames = resize_short_side(frames, rng, size=size)
  height, width = frames.shape[1:3]
  free = max(height, width) - size
  if crops == 1:
    starts = [free // 2]
  else:
    starts = [j * free // (crops - 1) for j in range(crops)]
  if width >= height:
    return np.stack([frames[:, :, s : s + size] for s in starts])
  return np.stack([frames[:, s : s + size] for s in starts])


def horizontal_flip(
  frames: np.ndarray, rng: np.random.Generator, *, probability: float = 0.5
) -> np.ndarray:
  """Mirror all frames left to right with a probability."""
  return frames[:, :, ::-1] if rng.random() < probability else frames
