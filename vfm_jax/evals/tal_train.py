"""Train a temporal detector on stored features.

The recipe of ActionFormer (Zhang et al. 2022, section 4) as the TWLV-I
evaluation framework runs it: focal and distance-IoU losses divided by a moving
average of the number of positive points, AdamW, a warm-up and half a cosine
each step, gradients clipped by their norm, and an average of the weights that
evaluations use.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vfm_jax import optim
from vfm_jax.evals.tal_data import Item, Video, crop
from vfm_jax.evals.tal_losses import losses, targets
from vfm_jax.models.temporal_localization import TemporalDetector
from vfm_jax.ops import segments as segments_lib

PyTree = Any

RANGES = ((0, 4), (4, 8), (8, 16), (16, 32), (32, 64), (64, 10_000))


class HeadState(NamedTuple):
  """Hold what training changes.

  Attributes:
    params: of the detector.
    ema: their average, which starts as a copy.
    opt_state: of the optimizer.
    normaliser: f32 [] moving average of the number of positive points.
  """

  params: PyTree
  ema: PyTree
  opt_state: PyTree
  normaliser: jax.Array


def learning_rate(
  step: Any,
  total_steps: int,
  *,
  peak: float,
  warmup_steps: int,
  final: float = 1e-8,
  milestones: tuple[int, ...] | None = None,
  gamma: float = 0.1,
) -> Any:
  """Return the rate of a step: from 0 to `peak`, then half a cosine down.

  The first step has rate 0, and the last of the warm-up the peak. A step past
  the end goes on along the cosine, upwards, as in the release.

  Args:
    step: number of finished steps, an int, NumPy or JAX array.
    total_steps: S, with the warm-up.
    peak: largest rate.
    warmup_steps: W; 0 for none.
    final: rate at step S.
    milestones: steps after the warm-up at which the rate is multiplied by
      `gamma`, in place of the cosine.
    gamma: see above.
  """
  xp = jnp if isinstance(step, jax.Array) else np
  after = xp.asarray(step) - warmup_steps
  if milestones is None:
    cosine = xp.cos(math.pi * after / max(total_steps - warmup_steps, 1))
    rate = final + (peak - final) * 0.5 * (1.0 + cosine)
  else:
    passed = sum(xp.where(after >= m, 1, 0) for m in milestones)
    rate = peak * gamma ** (passed * 1.0)
  ramp = peak * xp.asarray(step) / max(warmup_steps - 1, 1)
  return xp.where(after < 0, ramp, rate)


def decay_kernels(path: str, ndim: int) -> bool:
  """Say whether a parameter decays: kernels do, and nothing else."""
  del ndim
  return path.endswith('kernel')


@dataclasses.dataclass(frozen=True)
class HeadTraining:
  """Configure the training of a temporal detector.

  Attributes:
    lr: peak learning rate of AdamW (0.9, 0.999, eps 1e-8).
    epochs: passes over the training videos after the warm-up.
    warmup_epochs: passes over which the rate rises.
    batch: videos a step; the last, partial batch of an epoch is dropped.
    length: steps of the features that training sees, L: longer videos are
      cropped to it, shorter ones padded.
    ranges: distances in steps that the points of each level take.
    radius: see `ops.segments.assign`.
    weight_decay: of kernels.
    clip_norm: bound on the norm of the gradients.
    ema: decay of the average of the weights.
    normaliser: its first value, about the positive points of a batch.
    smoothing: of the class targets.
    weight: of the regression.
    crop_ratio: a video that fits is cropped to a random part of its length
      between these fractions; None leaves it whole.
    keep_ratio: part of a segment that must be in a crop for it to be kept.
  """

  lr: float = 1e-4
  epochs: int = 45
  warmup_epochs: int = 5
  batch: int = 2
  length: int = 2304
  ranges: tuple[tuple[float, float], ...] = RANGES
  radius: float | None = 1.5
  weight_decay: float = 0.05
  clip_norm: float = 1.0
  ema: float = 0.999
  normaliser: float = 100.0
  smoothing: float = 0.1
  weight: float = 2.0
  crop_ratio: tuple[float, float] | None = (0.9, 1.0)
  keep_ratio: float = 0.5

  def __post_init__(self):
    """Refuse settings that mean nothing."""
    if self.batch < 1 or self.epochs + self.warmup_epochs < 1:
      raise ValueError(
        'training.batch and the sum of training.epochs and '
        'training.warmup_epochs must be 1 or more, found '
        f'{self.batch}, {self.epochs} and {self.warmup_epochs}'
      )
    if not 0 <= self.ema < 1 or self.normaliser <= 0:
      raise ValueError(
        'training.ema lies in [0, 1) and training.normaliser is above 0, found '
        f'{self.ema} and {self.normaliser}'
      )

  @property
  def all_epochs(self) -> int:
    """Passes over the training videos with the warm-up."""
    return self.warmup_epochs + self.epochs

  def steps_per_epoch(self, videos: int) -> int:
    """Return the number of full batches.

    Raises:
      ValueError: there is none.
    """
    if videos < self.batch:
      raise ValueError(
        f'training.batch={self.batch} is larger than the {videos} training '
        f'videos, so no batch is full; set training.batch to {videos} or less'
      )
    return videos // self.batch

  def optimizer(
    self, params: PyTree, steps_per_epoch: int
  ) -> optax.GradientTransformation:
    """Return the optimizer of a run; kernels decay, nothing else does."""

    def rate(step, total_steps):
      return learning_rate(
        step,
        total_steps,
        peak=self.lr,
        warmup_steps=self.warmup_epochs * steps_per_epoch,
      )

    recipe = optim.Optimizer(
      lr=rate,
      weight_decay=self.weight_decay,
      method=_adam,
      clip_norm=self.clip_norm,
      decays=decay_kernels,
    )
    return recipe.build(params, self.all_epochs * steps_per_epoch)[0]

  def epoch(
    self, items: Sequence[Item], seed: int, number: int, most: int
  ) -> Iterator[dict[str, np.ndarray]]:
    """Yield the batches of an epoch: its own order and crops.

    Args:
      items: the training videos.
      seed: of the run.
      number: of the epoch.
      most: segments of a video that a batch has room for.
    """
    order = np.random.default_rng([seed, number]).permutation(len(items))
    for i in range(self.steps_per_epoch(len(items))):
      rows = []
      for index in order[i * self.batch : (i + 1) * self.batch]:
        rng = np.random.default_rng([seed, number, int(index)])
        rows.append(
          crop(
            items[index].read(),
            self.length,
            draw=lambda a, b, rng=rng: int(rng.integers(a, b + 1)),
            ratio=self.crop_ratio,
            keep=self.keep_ratio,
          )
        )
      yield pad_batch(rows, self.length, most)


def fit(
  detector: TemporalDetector,
  training: HeadTraining,
  items: Sequence[Item],
  *,
  seed: int,
  after_epoch: Callable[[int, PyTree], None] = lambda epoch, params: None,
) -> tuple[PyTree, np.ndarray]:
  """Train a detector and return its averaged weights.

  Args:
    detector: to train.
    training: how.
    items: the training videos.
    seed: of the weights, the order, the crops and the dropped branches.
    after_epoch: called with the number of finished epochs and the average.

  Returns:
    The average of the weights, and the loss f64 [epochs] of each epoch.

  Raises:
    ValueError: no full batch, levels that disagree, or a loss that is not
      finite.
  """
  if len(training.ranges) != detector.levels:
    raise ValueError(
      f'training.ranges has {len(training.ranges)} levels, '
      f'detector.pyramid.windows {detector.levels}; make them as many'
    )
  steps = training.steps_per_epoch(len(items))
  points = segments_lib.points(training.length, training.ranges)
  width = items[0].read().features.shape[1]
  features = jnp.zeros((1, training.length, width))
  params = jax.jit(detector.init)(
    jax.random.key(seed), features, jnp.ones(features.shape[:2], bool)
  )['params']
  tx = training.optimizer(params, steps)
  state = HeadState(
    params,
    jax.tree.map(jnp.copy, params),
    tx.init(params),
    jnp.float32(training.normaliser),
  )
  step = jax.jit(_make_step(detector, training, tx, points), donate_argnums=0)
  most = max(1, max(item.count for item in items))
  history, key = [], jax.random.key(seed)
  for number in range(training.all_epochs):
    values = []
    for i, batch in enumerate(training.epoch(items, seed, number, most)):
      drop = jax.random.fold_in(key, number * steps + i)
      state, loss = step(state, batch, drop)
      values.append(loss)
    history.append(float(np.mean(jax.device_get(values))))
    if not math.isfinite(history[-1]):
      raise ValueError(
        f'the loss of epoch {number} is {history[-1]}; lower training.lr='
        f'{training.lr:g} or training.clip_norm={training.clip_norm:g}'
      )
    after_epoch(number + 1, state.ema)
  return state.ema, np.array(history)


def pad_batch(
  videos: Sequence[Video], length: int, most: int | None = None
) -> dict[str, np.ndarray]:
  """Stack videos of different lengths.

  Args:
    videos: at most `length` steps each.
    length: of all of them.
    most: actions of a video that there is room for; as many as the videos
      need by default.

  Returns:
    features f32 [B, length, D] with mask bool [B, length], and segments f32
    [B, most, 2], labels int32 [B, most] with valid bool [B, most].
  """
  if most is None:
    most = max(len(video.labels) for video in videos)
  n, width = len(videos), videos[0].features.shape[1]
  batch = dict(
    features=np.zeros((n, length, width), np.float32),
    mask=np.zeros((n, length), bool),
    segments=np.zeros((n, most, 2), np.float32),
    labels=np.zeros((n, most), np.int32),
    valid=np.zeros((n, most), bool),
  )
  for i, video in enumerate(videos):
    steps, count = len(video.features), len(video.labels)
    batch['features'][i, :steps] = video.features
    batch['mask'][i, :steps] = True
    batch['segments'][i, :count] = video.segments
    batch['labels'][i, :count] = video.labels
    batch['valid'][i, :count] = True
  return batch


def _make_step(detector, training, tx, points):
  def step(state: HeadState, batch, key) -> tuple[HeadState, jax.Array]:
    classes, offsets = targets(
      batch, points, detector.num_classes, training.radius
    )
    keys = jax.random.split(key, len(batch['features']))

    def loss_of(params):
      inputs = batch['features'], batch['mask'], keys
      found = detector.apply({'params': params}, *inputs)
      out = losses(
        found,
        classes,
        offsets,
        state.normaliser,
        smoothing=training.smoothing,
        weight=training.weight,
      )
      return out.total, out

    grads, out = jax.grad(loss_of, has_aux=True)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = average_weights(state.ema, params, training.ema)
    return HeadState(params, average, opt_state, out.normaliser), out.total

  return step


def average_weights(average: PyTree, params: PyTree, decay: float) -> PyTree:
  """Return decay * average + (1 - decay) * params, leaf by leaf."""
  return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)


def _adam(decay, rows):
  return optim.adam(decay, rows, b2=0.999)


def padded_length(steps: int, length: int, divisor: int) -> int:
  """Return the length that a video is padded to when it is evaluated.

  Args:
    steps: of the video.
    length: that of training; shorter videos are padded to it.
    divisor: longer ones are padded to a multiple of it.
  """
  return length if steps <= length else -(-steps // divisor) * divisor
