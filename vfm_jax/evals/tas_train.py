"""Train a head for temporal action segmentation, one video a step.

The recipe of the evaluation framework of TWLV-I (arXiv:2408.11318,
repository): Adam with the decay in the gradient, the rate halved where the
loss of an epoch no longer falls, no augmentation, the last epoch reported.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vfm_jax.evals.base import Held
from vfm_jax.evals.tas_data import LabelledVideo
from vfm_jax.models.temporal_segmentation import Segmenter, losses
from vfm_jax.objectives.base import PyTree


@dataclasses.dataclass
class Plateau:
  """Cut the learning rate where a loss stops falling.

  The rate is multiplied by `factor` when more than `patience` values in a row
  are not below the lowest by a fraction of `threshold`.
  """

  lr: float
  factor: float = 0.5
  patience: int = 3
  threshold: float = 1e-4
  lowest: float = math.inf
  bad: int = 0

  def update(self, loss: float) -> float:
    """Return the rate after an epoch of this loss."""
    if loss < self.lowest * (1 - self.threshold):
      self.lowest, self.bad = loss, 0
    else:
      self.bad += 1
    if self.bad > self.patience:
      self.lr, self.bad = self.lr * self.factor, 0
    return self.lr


@dataclasses.dataclass(frozen=True)
class Training:
  """Say how a head is trained.

  Attributes:
    lr: of Adam (0.9, 0.999, eps 1e-8), at first.
    weight_decay: added to the gradient times the parameter.
    epochs: passes over the videos, in an order that is drawn once.
    smoothing: weight of the smoothing loss.
    factor: of the learning rate where the loss stalls.
    patience: epochs that it may stall.
  """

  lr: float = 5e-4
  weight_decay: float = 1e-5
  epochs: int = 120
  smoothing: float = 0.15
  factor: float = 0.5
  patience: int = 3

  def __post_init__(self):
    if self.epochs < 1 or not self.lr > 0:
      raise ValueError(
        'training.epochs must be 1 or more and training.lr positive, found '
        f'{self.epochs}, {self.lr}'
      )

  def fit(
    self, head: Segmenter, videos: Sequence[LabelledVideo], *, seed: int
  ) -> tuple[PyTree, np.ndarray]:
    """Train a head.

    Args:
      head: what to train.
      videos: to train on.
      seed: of the parameters, the order and the dropout.

    Returns:
      Parameters after the last epoch, and the summed loss f64 [epochs].

    Raises:
      ValueError: a label is no class of the head, or the loss is not finite.
    """
    top = max(int(v.y.max()) for v in videos)
    if top >= head.num_classes:
      raise ValueError(
        f'head.num_classes={head.num_classes} must be above the largest label, '
        f'found {top}'
      )
    order = np.random.default_rng(seed).permutation(len(videos))
    batches = [padded(videos[i].x, videos[i].y) for i in order]
    init_key, key = jax.random.split(jax.random.key(seed))
    params = init(head, init_key, batches[0][0].shape[-1])
    state = optax.scale_by_adam().init(params)
    plateau = Plateau(self.lr, self.factor, self.patience)
    step = functools.partial(
      train_step, Held(head), self.weight_decay, self.smoothing
    )
    lr, epochs = self.lr, []
    for epoch in range(self.epochs):
      total = []
      for i, batch in enumerate(batches):
        number = epoch * len(batches) + i
        params, state, loss = step(params, state, batch, lr, key, number)
        total.append(loss)
      epochs.append(float(np.sum(jax.device_get(total), dtype=np.float64)))
      if not math.isfinite(epochs[-1]):
        raise ValueError(
          f'the loss of epoch {epoch} is {epochs[-1]}; lower training.lr='
          f'{self.lr}'
        )
      lr = plateau.update(epochs[-1])
    return params, np.array(epochs)


def padded(
  x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Pad a video to one of few lengths, each of which is compiled once.

  Returns:
    x [1, P, D], y [1, P] and valid [1, P], P at most 8 or a quarter above L.
  """
  unit = max(2 ** (math.ceil(math.log2(len(x))) - 2), 8)
  tail = -len(x) % unit
  return (
    np.pad(x, ((0, tail), (0, 0)))[None],
    np.pad(y, (0, tail))[None],
    np.pad(np.ones(len(x), bool), (0, tail))[None],
  )


def predict(head: Segmenter, params: PyTree, x: np.ndarray) -> np.ndarray:
  """Return the class of each row of x [L, D] by the last stage, int32 [L]."""
  x, _, valid = padded(x, np.zeros(len(x), np.int32))
  return np.asarray(_classify(Held(head), params, x, valid))[0][valid[0]]


def init(head: Segmenter, key: jax.Array, dim: int) -> PyTree:
  """Return the parameters of a head for features of `dim` columns."""
  x = jax.ShapeDtypeStruct((1, 2, dim), jnp.float32)
  valid = jax.ShapeDtypeStruct((1, 2), jnp.bool_)
  return head.lazy_init(key, x, valid)['params']


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4))
def train_step(held, weight_decay, smoothing, params, state, batch, lr, key, n):
  """Return parameters, state of Adam and the loss before the update.

  Args:
    held: `Held` head.
    weight_decay: see `Training`.
    smoothing: see `Training`.
    params: of the head.
    state: of `optax.scale_by_adam()`.
    batch: x [B, L, D], y [B, L] and valid [B, L].
    lr: learning rate.
    key: of the dropout.
    n: number of the step.
  """
  head = held.objective
  x, y, valid = batch
  rngs = {'dropout': jax.random.fold_in(key, n)}

  def loss_of(params):
    logits = head.apply({'params': params}, x, valid, train=True, rngs=rngs)
    entropy, smooth = losses(logits, y, valid, padding=head.padding)
    return (entropy + smoothing * smooth).sum()

  loss, grads = jax.value_and_grad(loss_of)(params)
  grads = jax.tree.map(lambda g, p: g + weight_decay * p, grads, params)
  updates, state = optax.scale_by_adam().update(grads, state)
  params = jax.tree.map(lambda p, u: p - lr * u, params, updates)
  return params, state, loss


@functools.partial(jax.jit, static_argnums=0)
def _classify(held, params, x, valid):
  logits = held.objective.apply({'params': params}, x, valid)
  return logits[-1].argmax(-1).astype(jnp.int32)
