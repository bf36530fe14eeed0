"""Ask a convolutional network of images what it makes of a video."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from vfm_jax import load_weights
from vfm_jax.models import efficientnet
from vfm_jax.nn import layers
from vfm_jax.objectives.base import PyTree
from vfm_jax.objectives.teachers import Targets
from vfm_jax.ops import resize
from vfm_jax.ops.tokens import Grid


@dataclasses.dataclass(frozen=True)
class EfficientNetTeacher:
  """Learn from EfficientNet-lite0, frame by frame; satisfies `Teacher`.

  Ours: a teacher whose weights install with a package, where those of CLIP are
  not at hand. Frames are resized so that the network has one cell for each of
  the student's. Features have unit length. It has no attention to guide a mask
  with.

  Attributes:
    tap: number of the block, 0 to 15, whose feature maps are learned.
    slices: which frames speak for a slice of several: the 'mean' of all, or
      the 'first', which costs less.
    path: file of its weights, see `load_weights.efficientnet_lite0`.
  """

  tap: int = 10
  slices: Literal['mean', 'first'] = 'mean'
  path: str | None = None

  def __post_init__(self):
    """Refuse a block that there is not."""
    efficientnet.shape_of(self.tap)

  @property
  def features(self) -> int:
    """Return the number of features of a token."""
    return efficientnet.shape_of(self.tap)[1]

  @property
  def num_layers(self) -> int:
    """Return the number of layers, 1."""
    return 1

  def spec(self) -> PyTree:
    """Return shapes and types of the weights."""
    return load_weights.spec(efficientnet.EfficientNetLite0)

  def weights(self) -> PyTree:
    """Return the weights, float32 numpy.

    Raises:
      ImportError: the package with the weights is not installed.
      FileNotFoundError: there is no such file.
    """
    return load_weights.efficientnet_lite0(self.path, 'objective.teacher.path')

  def targets(self, weights: PyTree, video: jax.Array, grid: Grid) -> Targets:
    """Return features f32 [1, B, N, E] and no attention; see `Teacher`.

    Raises:
      ValueError: the frames do not divide into the slices of the grid.
    """
    b, t = video.shape[:2]
    if t % grid[0]:
      raise ValueError(
        f'expected a number of frames that {grid[0]} slices divide, found {t}; '
        'change `objective.encoder.tubelet` or the clip that `data` makes'
      )
    if self.slices == 'first':
      video = video[:, :: t // grid[0]]
    stride = efficientnet.shape_of(self.tap)[0]
    frames = video.reshape(-1, *video.shape[2:])
    frames = resize.bicubic(frames, grid[1] * stride, grid[2] * stride)
    module = efficientnet.EfficientNetLite0(tap=self.tap)
    x = module.apply({'params': weights}, (frames * 255.0 - 127.0) / 128.0)
    x = jnp.asarray(x).reshape(b, grid[0], -1, grid[1] * grid[2], self.features)
    features = layers.unit(x.mean(2).reshape(b, -1, self.features))
    return Targets(jax.lax.stop_gradient(features[None]))
