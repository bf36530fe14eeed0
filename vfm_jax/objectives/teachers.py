"""Ask a frozen network what it makes of a video, for others to learn."""

import dataclasses
import functools
from typing import Any, Literal, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from vfm_jax import convert, convert_umt
from vfm_jax.models import clip
from vfm_jax.models.clip import ClipViT
from vfm_jax.nn import layers
from vfm_jax.nn.transformer import stack_sown
from vfm_jax.objectives.base import PyTree
from vfm_jax.objectives.pixels import Channels, normalise
from vfm_jax.ops import resize
from vfm_jax.ops.tokens import Grid


class Targets(flax.struct.PyTreeNode):
  """Hold what a teacher says of each token of a student.

  Attributes:
    features: f32 [K, B, N, E] of K layers, the deepest last.
    attention: f32 [B, N], how much the teacher looks at each token; None for a
      teacher without.
  """

  features: jax.Array
  attention: jax.Array | None = None


@runtime_checkable
class Teacher(Protocol):
  """What a distillation needs of a frozen network."""

  @property
  def features(self) -> int:
    """Return the number of features of a token, E."""
    ...

  @property
  def num_layers(self) -> int:
    """Return the number of layers that are learned, K."""
    ...

  def spec(self) -> PyTree:
    """Return shapes and types of the weights, without reading them."""
    ...

  def weights(self) -> PyTree:
    """Return the weights, on the host."""
    ...

  def targets(self, weights: PyTree, video: jax.Array, grid: Grid) -> Targets:
    """Return what is to be learned, without a gradient.

    Args:
      weights: from `weights`.
      video: f32 [B, T, H, W, 3] in [0, 1], with nothing hidden.
      grid: token grid (T', H', W') of the student.
    """
    ...


@dataclasses.dataclass(frozen=True)
class ClipTeacher:
  """Learn from CLIP's image tower, frame by frame (UMT, arXiv:2303.16058).

  Frames are resized so that the teacher's patches are the student's cells.
  The features of a layer are those after the last LayerNorm and the projection.
  The attention is that of the class token in the last block, the mean over the
  heads; what it gives to itself is left out.

  Attributes:
    model: the image tower.
    path: file of its weights, see `convert_umt.from_clip`.
    entry: entry of a torch file that holds them.
    seed: of random weights in place of a file: a control, and for tests.
    taps: blocks whose features are learned, ascending; negative ones count
      from the end.
    slices: which frames speak for a slice of several: the 'mean' of all, or
      the 'first', which costs less. UMT has slices of one frame.
    normalise: 'l2' for features of unit length, or 'none'.
    mean: per-channel mean of the teacher's input, of pixels in [0, 1]. The
      released UMT code leaves the student's normalisation (ImageNet's) on.
    std: per-channel standard deviation.
  """

  model: ClipViT
  path: str = ''
  entry: str | None = None
  seed: int | None = None
  taps: tuple[int, ...] = (-6, -5, -4, -3, -2, -1)
  slices: Literal['mean', 'first'] = 'mean'
  normalise: Literal['l2', 'none'] = 'l2'
  mean: Channels = clip.MEAN
  std: Channels = clip.STD

  def __post_init__(self):
    """Refuse a tower that gives no patches."""
    if self.model.output != 'patches':
      raise ValueError(
        "`objective.teacher.model.output`: expected 'patches', found "
        f'{self.model.output!r}'
      )

  @property
  def features(self) -> int:
    """Return the number of features of a token."""
    dims = self.model.dims
    return dims.features or dims.width

  @property
  def num_layers(self) -> int:
    """Return the number of layers."""
    return len(self.taps)

  def spec(self) -> PyTree:
    """Return shapes and types of the weights."""
    return jax.eval_shape(self._init, 0)

  def weights(self) -> PyTree:
    """Return the weights, float32 numpy.

    Raises:
      ValueError: neither `path` nor `seed` is set, or both are.
      ConversionError: the tensors do not fit the model.
    """
    if bool(self.path) == (self.seed is not None):
      raise ValueError(
        'expected either a file of the weights of the image tower as '
        '`objective.teacher.path`, or `objective.teacher.seed` for random '
        f'ones, found {self.path!r} and {self.seed}'
      )
    return self._loaded

  def targets(self, weights: PyTree, video: jax.Array, grid: Grid) -> Targets:
    """Return features and attention; see `Teacher`.

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
    frames = video.reshape(-1, *video.shape[2:])
    patch = self.model.dims.patch
    frames = resize.bicubic(frames, grid[1] * patch, grid[2] * patch)
    x = normalise(frames, self.mean, self.std)
    tapped, sown = self.model.apply(
      {'params': jax.lax.stop_gradient(weights)},
      x[:, None],
      self.taps,
      method='intermediate',
      mutable=['attention'],
    )
    attention = stack_sown(sown['attention'])['first_query'][-1, :, 1:]

    def over_slice(x: Any) -> jax.Array:
      """Average [B T, cells, ...] over the frames of each slice."""
      x = x.astype(jnp.float32)
      x = x.reshape(b, grid[0], -1, *x.shape[1:]).mean(2)
      return x.reshape(b, -1, *x.shape[3:])

    features = jnp.stack([over_slice(x) for x in tapped])
    if self.normalise == 'l2':
      features = layers.unit(features)
    out = Targets(features, over_slice(attention))
    return jax.lax.stop_gradient(out)

  def _init(self, seed: int | jax.Array) -> PyTree:
    side = self.model.image_size
    video = jnp.zeros((1, 1, side, side, 3))
    return self.model.init(jax.random.key(seed), video)['params']

  @functools.cached_property
  def _loaded(self) -> PyTree:
    if self.seed is not None:
      return jax.tree.map(np.asarray, jax.jit(self._init)(self.seed))
    _, state = convert.read_entry(self.path, entry=self.entry)
    return convert_umt.from_clip(state, self.spec())

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in self.__dict__.items() if k != '_loaded'}
