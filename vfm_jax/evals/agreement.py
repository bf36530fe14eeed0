"""Ask a classifier of real images whether samples show the class asked for."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vfm_jax.data.pipeline import Pipeline
from vfm_jax.evals.base import Keeps, to_host, top1
from vfm_jax.evals.samples import draw_samples
from vfm_jax.objectives.base import PyTree

# Largest turn in radians, change of size, slant, and shift as a share of the
# side, that augmentation draws.
_TURN, _SIZE, _SLANT, _SHIFT = 0.2, 0.12, 0.15, 0.07


class SmallCNN(nn.Module):
  """Classify small grey images [B, H, W, 1] in [0, 1].

  Attributes:
    classes: number of classes.
    dropout: rate on the pooled features, used where a key is given.
  """

  classes: int
  dropout: float = 0.5

  @nn.compact
  def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Return logits [B, classes]."""
    for width, size in ((32, 5), (64, 3)):
      x = nn.relu(nn.Conv(width, (size, size))(x))
      x = nn.max_pool(x, (2, 2), (2, 2))
    x = nn.relu(nn.Conv(64, (3, 3))(x))
    x = x.reshape(len(x), -1)
    if key is not None:
      keep = jax.random.bernoulli(key, 1.0 - self.dropout, x.shape)
      x = x * keep / (1.0 - self.dropout)
    return nn.Dense(self.classes)(nn.relu(nn.Dense(128)(x)))


@dataclasses.dataclass(frozen=True)
class Agreement(Keeps):
  """Score samples by class; satisfies `Evaluator`.

  A small convolutional network learns the classes of real images, with small
  turns and shifts, and says which class each sample shows. Its accuracy on
  held-out real images is reported beside, since nothing above it can be
  expected. It is trained once a process.

  Attributes:
    train: real images, grey, that the classifier learns from.
    val: real images that it is scored on.
    label: the label in `batch['labels']` that samples are drawn for.
    count: number of samples, of all classes in turn.
    epochs: passes over the training images.
    batch_size: images a step, and samples drawn at a time.
    lr: peak of the learning rate, which a cosine takes to 0 (Adam).
  """

  train: Pipeline
  val: Pipeline
  label: str = 'label'
  count: int = 200
  epochs: int = 14
  batch_size: int = 64
  lr: float = 2e-3

  def run(
    self,
    objective: Any,
    params: PyTree,
    *,
    seed: int,
    mesh: jax.sharding.Mesh | None = None,
  ) -> dict[str, float]:
    """Return `agreement_n<count>` and `classifier_top1`, both fractions.

    Args:
      objective: one that satisfies `Samples` and takes labels.
      params: its parameters.
      seed: of the samples and of the classifier.
      mesh: draws over it; None uses one device.

    Raises:
      TypeError: the objective draws no samples.
      ValueError: it takes no labels, or the data have no such label.
    """
    labels = objective.check_labels(None)
    if labels is None:
      raise ValueError(
        'evals Agreement needs samples of a class: expected '
        '`objective.label` to name a label, found None'
      )
    kept = f'classifier, seed {seed}'
    if kept not in self._kept:
      self._kept[kept] = self._fit(len(labels), seed)
    network, weights, accuracy, shape = self._kept[kept]
    drawn = draw_samples(
      objective,
      params,
      shape,
      labels,
      count=self.count,
      seed=seed,
      batch_size=self.batch_size,
      mesh=mesh,
    )
    asked = np.asarray(labels)[np.arange(self.count) % len(labels)]
    agreement = _score(network, weights, _grey(drawn), asked, self.batch_size)
    return {
      f'agreement_n{self.count}': agreement,
      'classifier_top1': accuracy,
    }

  def _fit(self, classes: int, seed: int):
    x, y, shape = self._read(self.train)
    network = SmallCNN(classes)
    weights = fit(
      network,
      x,
      y,
      seed=seed,
      epochs=self.epochs,
      batch_size=self.batch_size,
      lr=self.lr,
    )
    x, y, _ = self._read(self.val)
    accuracy = _score(network, weights, x, y, self.batch_size)
    return network, weights, accuracy, shape

  def _read(self, pipeline: Pipeline):
    """Return images f32 [N, H, W, 1], classes int32 [N], shape of a sample."""
    images, classes, shape = [], [], ()
    for batch in pipeline.eval_batches(self.batch_size):
      if self.label not in batch['labels']:
        raise ValueError(
          f'expected a label {self.label!r}, found {sorted(batch["labels"])}; '
          'change `evals` Agreement.label or what its `train` and `val` yield'
        )
      valid = batch['valid']
      images.append(batch['video'][valid])
      classes.append(batch['labels'][self.label][valid])
      shape = batch['video'].shape[1:]
    return _grey(np.concatenate(images)), np.concatenate(classes), shape


def fit(
  network: nn.Module,
  x: np.ndarray,
  y: np.ndarray,
  *,
  seed: int,
  epochs: int,
  batch_size: int,
  lr: float,
) -> PyTree:
  """Return the weights of a classifier trained on augmented images.

  Args:
    network: (x, key) -> logits.
    x: f32 [N, H, W, 1] in [0, 1].
    y: int32 [N].
    seed: of the weights, the order and the augmentation.
    epochs: passes over the images; what fills no batch is left out of a pass.
    batch_size: images a step.
    lr: peak of the learning rate.

  Raises:
    ValueError: there are fewer images than a batch takes.
  """
  a_pass = len(x) // batch_size
  if not a_pass:
    raise ValueError(
      f'expected at least {batch_size} images to train a classifier '
      f'(`evals` Agreement.batch_size), found {len(x)}'
    )
  root = jax.random.key(seed)
  weights: PyTree = network.init(root, x[:1])
  optimizer = optax.adam(optax.cosine_decay_schedule(lr, epochs * a_pass))
  state = optimizer.init(weights)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(weights, state, x, y, key):
    keep, *augmented = jax.random.split(key, 1 + len(x))
    x = jax.vmap(augment)(x, jnp.stack(augmented))

    def loss(weights):
      logits: Any = network.apply(weights, x, keep)
      return optax.losses.softmax_cross_entropy_with_integer_labels(
        logits, y
      ).mean()

    updates, state = optimizer.update(jax.grad(loss)(weights), state)
    return optax.apply_updates(weights, updates), state

  rng = np.random.default_rng(seed)
  for epoch in range(epochs):
    order = rng.permutation(len(x))[: a_pass * batch_size]
    for i, rows in enumerate(order.reshape(a_pass, batch_size)):
      key = jax.random.fold_in(root, epoch * a_pass + i)
      weights, state = step(weights, state, x[rows], y[rows], key)
  return weights


def augment(image: jax.Array, key: jax.Array) -> jax.Array:
  """Return an image [H, W, 1] turned, resized, slanted, shifted a little."""
  height, width, _ = image.shape
  span = jnp.array([_TURN, _SIZE, _SLANT, _SHIFT * height, _SHIFT * width])
  draw = jax.random.uniform(key, (5,), minval=-1.0, maxval=1.0) * span
  turn, size, slant = draw[:3]
  cos, sin = jnp.cos(turn), jnp.sin(turn)
  matrix = jnp.array([[cos, -sin], [sin, cos]])
  matrix = matrix @ jnp.array([[1.0, slant], [0.0, 1.0]]) * (1.0 + size)
  centre = jnp.array([height - 1, width - 1]) / 2
  grid = jnp.stack(jnp.mgrid[:height, :width], -1).reshape(-1, 2) - centre
  place = grid @ matrix.T + centre + draw[3:]
  values = jax.scipy.ndimage.map_coordinates(image[..., 0], place.T, order=1)
  return values.reshape(image.shape)


def _grey(images):
  """Return uint8 [N, 1, H, W, C] as f32 [N, H, W, 1] in [0, 1]."""
  return images[:, 0].mean(-1, keepdims=True, dtype=np.float32) / 255.0


def _score(network, weights, x, y, batch_size) -> float:
  logits = [
    to_host(_logits(network, weights, x[i : i + batch_size]))
    for i in range(0, len(x), batch_size)
  ]
  return top1(np.concatenate(logits), y)


@functools.partial(jax.jit, static_argnums=0)
def _logits(network, weights, x):
  return network.apply(weights, x)
