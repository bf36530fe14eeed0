"""Learn a frozen teacher's features of the visible tokens (UMT)."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from vfm_jax import convert_umt
from vfm_jax.models.aligned import AlignedHeads
from vfm_jax.models.encoders import VideoViT
from vfm_jax.objectives import base, pixels
from vfm_jax.objectives.teachers import Targets, Teacher
from vfm_jax.ops import guided
from vfm_jax.ops import tokens as tok
from vfm_jax.ops.keys import fold

Distance = Literal['l2', 'mse', 'smooth_l1']


@dataclasses.dataclass(frozen=True)
class Distill:
  """Encode the visible tokens only and predict a teacher's features of them.

  Several layers of the encoder go through its final LayerNorm and a head each;
  layer k of the student learns layer k of the teacher, which sees the whole
  clip. The loss is averaged over layers, tokens and examples (UMT,
  arXiv:2303.16058).

  Attributes:
    encoder: encoder of the visible tokens; must return normalised tokens.
    teacher: whose features are learned; its weights are neither optimised nor
      saved in checkpoints.
    heads: from the encoder's features to the teacher's.
    mask: what is hidden: a sampler of `ops.masking` or `ops.blocks`, or one
      that the teacher's attention guides, see `ops.guided`.
    image_mask: the same for clips of one slice (images); None for `mask`.
    taps: blocks of the encoder that learn, ascending, one a layer of the
      teacher; negative ones count from the end.
    distance: 'l2' is 2 - 2 <s, t>, the squared distance of unit vectors, summed
      over features; 'mse' and 'smooth_l1' (beta 1) are averaged over them.
    mean: per-channel mean of the encoder's input, of pixels in [0, 1].
    std: per-channel standard deviation.
  """

  encoder: VideoViT
  teacher: Teacher
  heads: AlignedHeads = AlignedHeads()
  mask: Callable[..., Any] = guided.AttentionGuided()
  image_mask: Callable[..., Any] | None = None
  taps: tuple[int, ...] = (-6, -5, -4, -3, -2, -1)
  distance: Distance = 'l2'
  mean: pixels.Channels = pixels.IMAGENET_MEAN
  std: pixels.Channels = pixels.IMAGENET_STD

  def __post_init__(self):
    """Refuse layers that have no partner, and an encoder that pools."""
    encoder = self.encoder
    if encoder.pooling != 'none' or encoder.norm != 'tokens':
      raise ValueError(
        "distillation needs `objective.encoder.pooling` 'none' and "
        f"`objective.encoder.norm` 'tokens', found {encoder.pooling!r} and "
        f'{encoder.norm!r}'
      )
    if len(self.taps) != self.teacher.num_layers or not self.taps:
      raise ValueError(
        f'expected as many `objective.taps` as `objective.teacher.taps`, found '
        f'{len(self.taps)} and {self.teacher.num_layers}'
      )
    if list(self.taps) != sorted(set(self.taps)):
      raise ValueError(
        f'expected ascending `objective.taps`, found {self.taps}'
      )

  def init(
    self, rng: jax.Array, batch: base.Batch
  ) -> tuple[base.PyTree, base.PyTree]:
    """Return the parameters {'encoder', 'heads'} and no other state."""
    video = self.normalise(self.pixels_of(batch))[:1]
    rngs = jax.random.split(rng)
    idx = jnp.zeros((1, 1), jnp.int32)
    return {
      'encoder': self.encoder.init(rngs[0], video)['params'],
      'heads': self.heads.init(
        rngs[1],
        [jnp.zeros((1, 1, self.encoder.dims.width))] * len(self.taps),
        idx,
        **self._head_shape(self.grid(video)),
      )['params'],
    }, {}

  def teacher_spec(self) -> dict[str, base.PyTree]:
    """Return shapes and types of what `loss` finds beside the parameters."""
    return {'teacher': self.teacher.spec()}

  def teachers(self) -> dict[str, base.PyTree]:
    """Return what `loss` finds beside the parameters."""
    return {'teacher': self.teacher.weights()}

  def loss(
    self,
    params: base.PyTree,
    extra: base.PyTree,
    batch: base.Batch,
    rng: jax.Array,
    *,
    train: bool,
  ) -> base.LossOut:
    """Return the summed distances of the visible tokens and their number.

    Args:
      params: from `init`, and 'teacher' from `teachers`.
      extra: passed through.
      batch: `video` uint8 [B, T, H, W, 3], or float in [0, 1]; `row` int32 [B].
      rng: key of the step.
      train: whether stochastic depth is on.

    Raises:
      ValueError: the weights of the teacher are missing.
    """
    video = self.pixels_of(batch)
    keys = base.example_keys(rng, batch)
    targets = self.targets(params, video)
    # Streams of the first mask, where there may be several.
    masks, drops = (fold(fold(keys, i), 0) for i in (0, 2))
    mask, path = self.mask, 'objective.mask'
    if self.grid(video)[0] == 1 and self.image_mask is not None:
      mask, path = self.image_mask, 'objective.image_mask'
    split = guided.split(
      mask, masks, self.grid(video), targets.attention, path=path
    )
    visible_idx = split.visible_idx
    _, tapped = self.encode(
      params, video, visible_idx, drops if train else None
    )
    error = self.error(params, video, tapped, visible_idx, targets)
    total, count = error.sum(), jnp.asarray(error.size, jnp.float32)
    return base.LossOut(
      sums=total[None],
      counts=count[None],
      metrics={f'distill_{self.distance}': total / count},
      extra=extra,
    )

  after_update = base.keep_extra

  def converted(
    self, state: Mapping[str, Any], template: base.PyTree
  ) -> base.PyTree:
    """Return the parameters of a file that UMT's pretraining left.

    Args:
      state: its tensors by name.
      template: parameters, or their shapes.

    Raises:
      ConversionError: a tensor is missing, left over or of another shape.
    """
    return convert_umt.from_umt(state, template, encoder=self.encoder)

  def embed(self, params: base.PyTree, batch: base.Batch) -> jax.Array:
    """Return the mean of all tokens after the final norm, f32 [B, D]."""
    return self.tokens(params, batch).mean(1)

  def tokens(self, params: base.PyTree, batch: base.Batch) -> jax.Array:
    """Return all tokens after the final norm, f32 [B, n, D]."""
    video = self.normalise(self.pixels_of(batch))
    tokens: Any = self.encoder.apply({'params': params['encoder']}, video)
    return tokens.astype(jnp.float32)

  def pixels_of(self, batch: base.Batch) -> jax.Array:
    """Return the clips f32 [B, T, H, W, 3] in [0, 1]."""
    return pixels.pixels(batch, channels=len(self.mean))

  def normalise(self, video: jax.Array) -> jax.Array:
    """Return clips as the encoder takes them."""
    return pixels.normalise(video, self.mean, self.std)

  def grid(self, video: jax.Array) -> tok.Grid:
    """Return the encoder's token grid (T', H', W') of clips."""
    filled = jax.eval_shape(
      lambda x: tok.fill_tubelet(x, self.encoder.tubelet), video
    )
    return tok.token_grid(
      filled.shape, self.encoder.patch_shape, path='objective.encoder'
    )

  def targets(self, params: base.PyTree, video: jax.Array) -> Targets:
    """Return what the teacher says of all tokens of clips in [0, 1].

    Raises:
      ValueError: `params` has no 'teacher'.
    """
    if 'teacher' not in params:
      raise ValueError(
        'expected the weights of the teacher beside the parameters, as '
        f'`Experiment.teachers` gives them, found {sorted(params)}'
      )
    return self.teacher.targets(params['teacher'], video, self.grid(video))

  def encode(
    self,
    params: base.PyTree,
    video: jax.Array,
    visible_idx: jax.Array,
    drop_keys: jax.Array | None = None,
  ) -> tuple[jax.Array, list[jax.Array]]:
    """Return the tokens [B, n, D] of the last block and K times of `taps`.

    Args:
      params: from `init`.
      video: f32 [B, T, H, W, 3] in [0, 1].
      visible_idx: int32 [B, n] tokens to encode.
      drop_keys: one key an example [B] for stochastic depth, or None.
    """
    out: Any = self.encoder.apply(
      {'params': params['encoder']},
      self.normalise(video),
      self.taps,
      visible_idx,
      drop_keys,
      method='tapped',
    )
    return out

  def error(
    self,
    params: base.PyTree,
    video: jax.Array,
    tapped: Sequence[jax.Array],
    visible_idx: jax.Array,
    targets: Targets,
  ) -> jax.Array:
    """Return the distance of each visible token, f32 [B, n], over all layers.

    Args:
      params: from `init`.
      video: f32 [B, T, H, W, 3], for its shape only.
      tapped: from `encode`.
      visible_idx: int32 [B, n].
      targets: from `targets`.
    """
    pred = self.predict(params, video, tapped, visible_idx)
    take = jax.vmap(tok.take, (0, None))
    return distance(pred, take(targets.features, visible_idx), self.distance)

  def predict(
    self,
    params: base.PyTree,
    video: jax.Array,
    tapped: Sequence[jax.Array],
    visible_idx: jax.Array,
  ) -> jax.Array:
    """Return what the heads make of the visible tokens, f32 [K, B, n, E]."""
    out: Any = self.heads.apply(
      {'params': params['heads']},
      tapped,
      visible_idx,
      **self._head_shape(self.grid(video)),
    )
    return out

  def _head_shape(self, grid: tok.Grid) -> dict[str, Any]:
    return dict(
      features=self.teacher.features,
      grid=grid,
      built_grid=self.encoder.built_grid,
    )


def distance(pred: jax.Array, target: jax.Array, kind: Distance) -> jax.Array:
  """Return how far features [K, B, n, E] are from their targets, f32 [B, n].

  Args:
    pred: of the student.
    target: of the teacher.
    kind: see `Distill.distance`.
  """
  if kind == 'l2':
    error = 2.0 - 2.0 * (pred * target).sum(-1)
  else:
    size = jnp.abs(pred - target)
    square = jnp.square(size)
    if kind == 'smooth_l1':
      square = jnp.where(size < 1.0, 0.5 * square, size - 0.5)
    error = square.mean(-1)
  return error.mean(0)
