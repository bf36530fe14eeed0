"""Fit a linear classifier on frozen features.

The offline protocol of the TWLV-I evaluation framework (arXiv 2408.11318 and
its repository, `linear_probing`): one linear layer with bias on raw features,
Adam, linear warm-up over 10 epochs then a cosine over the rest of 150, batch
1024 without the last partial batch, the final epoch reported. With several
clips a video, each access draws one of them and evaluation averages the
softmax over them.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vfm_jax import schedules
from vfm_jax.evals.base import Features, top1


class Linear(NamedTuple):
  """Parameters of the classifier: kernel f32 [D, C], bias f32 [C]."""

  kernel: jax.Array
  bias: jax.Array


@dataclasses.dataclass(frozen=True)
class LinearResult:
  """Fitted parameters, what happened each step, and the final evaluation.

  Attributes:
    params: the classifier after the last step.
    losses: f32 [steps] cross entropy of each batch before its update.
    lrs: f64 [steps] learning rate of each step.
    scores: f32 [n, C] logits, or mean probabilities where a video has clips.
    predictions: int32 [n].
    top1: fraction in [0, 1].
  """

  params: Linear
  losses: np.ndarray
  lrs: np.ndarray
  scores: np.ndarray
  predictions: np.ndarray
  top1: float


@dataclasses.dataclass(frozen=True)
class LinearProbe:
  """Configure the linear probe.

  Attributes:
    lr: peak learning rate of Adam (0.9, 0.999, eps 1e-8, no decay).
    batch: videos a step; the last, partial batch of an epoch is dropped.
    epochs: passes over the training videos.
    warmup_epochs: passes over which lr rises from lr / W to lr.
    min_lr: value the cosine falls towards.
    fit_batch: take min(batch, number of training videos) as the batch, for
      sets smaller than `batch`; without it such a set is an error, as every
      batch would be dropped.
  """

  lr: float = 1e-3
  batch: int = 1024
  epochs: int = 150
  warmup_epochs: int = 10
  min_lr: float = 0.0
  fit_batch: bool = False

  def __post_init__(self):
    if self.batch < 1 or self.epochs < 1:
      raise ValueError(
        'linear.batch and linear.epochs must be 1 or more, found '
        f'{self.batch}, {self.epochs}'
      )
    if not 0 <= self.warmup_epochs < self.epochs:
      raise ValueError(
        'linear.warmup_epochs must be at least 0 and below linear.epochs='
        f'{self.epochs}, found {self.warmup_epochs}'
      )

  @property
  def name(self) -> str:
    """Protocol name that metric names carry."""
    return f'linear{self.epochs}ep'

  def steps_per_epoch(self, n: int) -> int:
    """Return the number of full batches in n videos.

    Raises:
      ValueError: there is none.
    """
    steps = n // self.batch_of(n)
    if not steps:
      raise ValueError(
        f'linear.batch={self.batch} is larger than the {n} training videos, '
        f'so no batch is full; set linear.batch to {n} or less, or '
        'linear.fit_batch=True'
      )
    return steps

  def batch_of(self, n: int) -> int:
    """Return the batch size used on n training videos."""
    return min(self.batch, n) if self.fit_batch and n else self.batch

  def learning_rates(self, n: int) -> np.ndarray:
    """Return the learning rate of every step on n videos, f64 [steps]."""
    steps = self.steps_per_epoch(n)
    total = self.epochs * steps
    return schedules.warmup_cosine(
      np.arange(total),
      total,
      peak=self.lr,
      final=self.min_lr,
      warmup_steps=self.warmup_epochs * steps,
      ramp=schedules.early_ramp,
    )

  def batch_rows(self, train: Features, seed: int) -> np.ndarray:
    """Draw the rows of `train.x` in every batch, int32 [steps, batch].

    Each epoch is a new permutation of the videos; a video with several rows
    gives one at random each time.
    """
    rng = np.random.default_rng(seed)
    n = len(train.y)
    batch, steps = self.batch_of(n), self.steps_per_epoch(n)
    videos = np.concatenate(
      [rng.permutation(n)[: steps * batch] for _ in range(self.epochs)]
    )
    counts = train.counts
    choice = rng.integers(counts[videos])
    return rows_of(train, videos, choice).reshape(-1, batch)

  def run(
    self,
    train: Features,
    val: Features,
    num_classes: int,
    *,
    seed: int = 0,
    params: Linear | None = None,
    rows: np.ndarray | None = None,
  ) -> LinearResult:
    """Fit on `train`, evaluate on `val`.

    Args:
      train: features to fit on.
      val: features to evaluate on.
      num_classes: outputs of the classifier.
      seed: of the initial weights and the batches.
      params: initial weights in place of drawn ones.
      rows: int [steps, batch] batches in place of drawn ones.

    Raises:
      ValueError: no full batch, or a label out of range.
    """
    if train.y.max() >= num_classes:
      raise ValueError(
        f'training labels must lie in [0, {num_classes}), found {train.y.max()}'
      )
    lrs = self.learning_rates(len(train.y))
    if rows is None:
      rows = self.batch_rows(train, seed)
    if params is None:
      key = jax.random.key(seed)
      params = init_linear(key, train.x.shape[1], num_classes)
    params, losses = fit(params, train, rows, lrs)
    scores = predict(params, val)
    return LinearResult(
      params,
      losses,
      lrs,
      scores,
      scores.argmax(-1).astype(np.int32),
      top1(scores, val.y),
    )


def init_linear(key: jax.Array, dim: int, num_classes: int) -> Linear:
  """Draw kernel [D, C] and bias [C] from U(-1/sqrt(D), 1/sqrt(D))."""
  a, b = jax.random.split(key)
  bound = dim**-0.5
  return Linear(
    jax.random.uniform(a, (dim, num_classes), minval=-bound, maxval=bound),
    jax.random.uniform(b, (num_classes,), minval=-bound, maxval=bound),
  )


def rows_of(
  features: Features, videos: np.ndarray, choice: np.ndarray
) -> np.ndarray:
  """Return the row, int32, of clip choice[i] of videos[i] (same shapes)."""
  starts = np.concatenate([[0], np.cumsum(features.counts)[:-1]])
  return (starts[videos] + choice).astype(np.int32)


def fit(
  params: Linear, train: Features, rows: np.ndarray, lrs: np.ndarray
) -> tuple[Linear, np.ndarray]:
  """Train on batches `rows` [steps, batch] at rates [steps]; one compiled scan.

  Returns:
    The parameters after the last step and the loss f32 [steps] of each batch.
  """
  params, losses = _fit(
    params,
    jnp.asarray(train.x),
    jnp.asarray(train.y[train.video]),
    jnp.asarray(rows, jnp.int32),
    jnp.asarray(lrs, jnp.float32),
  )
  return params, np.asarray(losses)


def predict(params: Linear, features: Features) -> np.ndarray:
  """Return scores f32 [n, C]: logits, or the mean softmax over clips."""
  logits = _logits(params, jnp.asarray(features.x))
  if features.one_row_each:
    return np.asarray(logits)
  probs = np.asarray(jax.nn.softmax(logits, axis=-1))
  sums = np.zeros((len(features.y), probs.shape[1]), np.float32)
  np.add.at(sums, features.video, probs)
  return sums / features.counts[:, None]


def _logits(params: Linear, x: jax.Array) -> jax.Array:
  kernel, bias = params
  return jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST) + bias


@jax.jit
def _fit(params, x, y, rows, lrs):
  adam = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)

  def loss_of(params, index):
    logits = _logits(params, x[index])
    ce = optax.softmax_cross_entropy_with_integer_labels(logits, y[index])
    return ce.mean()

  def step(carry, item):
    params, state = carry
    index, lr = item
    loss, grads = jax.value_and_grad(loss_of)(params, index)
    updates, state = adam.update(grads, state)
    params = jax.tree.map(lambda p, u: p - lr * u, params, updates)
    return (params, state), loss

  carry = (params, adam.init(params))
  (params, _), losses = jax.lax.scan(step, carry, (rows, lrs))
  return params, losses
