"""Probe an objective's embeddings: kNN and a linear classifier, by label."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from vfm_jax import sharding
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.evals.base import Keeps, class_count
from vfm_jax.evals.embed import Embedded, embed
from vfm_jax.evals.knn import KNN
from vfm_jax.evals.linear import LinearProbe
from vfm_jax.objectives.base import Batch, PyTree


@dataclasses.dataclass(frozen=True)
class Probes(Keeps):
  """Evaluate frozen clip embeddings; satisfies `Evaluator`.

  Attributes:
    train: examples that the probes learn from.
    val: examples that they are scored on.
    labels: names in `batch['labels']`, each probed on its own.
    knn: nearest neighbours, or None.
    linear: linear classifier, or None.
    batch_size: clips embedded at a time.
    pixels: also probe clips shrunk to this height and width and flattened,
      the baseline that an encoder has to beat; None leaves it out.
    cache: keep the decoded clips in memory, since the same ones are embedded
      at every evaluation; for sets that fit.
  """

  train: Pipeline
  val: Pipeline
  labels: tuple[str, ...]
  knn: KNN | None = KNN()
  linear: LinearProbe | None = LinearProbe()
  batch_size: int = 32
  pixels: int | None = None
  cache: bool = True

  def __post_init__(self):
    if not self.labels or (self.knn is None and self.linear is None):
      raise ValueError(
        'probes need at least one label and one of knn and linear, found '
        f'labels={self.labels}, knn={self.knn}, linear={self.linear}'
      )
    n = self.train.num_examples
    if self.knn is not None and self.knn.k > n:
      raise ValueError(
        f'probes.knn.k={self.knn.k} neighbours asked of {n} training clips; '
        f'set probes.knn.k to {n} or less'
      )
    if self.linear is not None:
      self.linear.steps_per_epoch(n)

  def run(
    self,
    objective: Any,
    params: PyTree,
    *,
    seed: int,
    mesh: jax.sharding.Mesh | None = None,
  ) -> dict[str, float]:
    """Return top-1 fractions, as `<label>_knn<k>_top1` and the like.

    Args:
      objective: one that satisfies `Embeds`.
      params: its parameters.
      seed: of the linear probe's weights and batches.
      mesh: embeds over it; None uses one device.

    Raises:
      TypeError: the objective does not embed.
      ValueError: a label is missing, or the embeddings are not finite.
    """
    sides = [
      embed(objective, params, self._batches(side, mesh), mesh=mesh)
      for side in ('train', 'val')
    ]
    out = self._score('', sides, seed)
    if self.pixels is not None:
      kept = f'pixels, seed {seed}'
      if kept not in self._kept:
        sides = [
          pixel_features(self._batches(side, mesh), self.pixels)
          for side in ('train', 'val')
        ]
        self._kept[kept] = self._score(f'pixels{self.pixels}_', sides, seed)
      out |= self._kept[kept]
    return out

  def _score(
    self, prefix: str, sides: list[Embedded], seed: int
  ) -> dict[str, float]:
    out = {}
    for label in self.labels:
      train, val = (side.features(label) for side in sides)
      classes = class_count(train, val)
      for probe in filter(None, (self.knn, self.linear)):
        result = probe.run(train, val, classes, seed=seed)
        out[f'{label}_{prefix}{probe.name}_top1'] = result.top1
    return out

  def _batches(self, side: str, mesh) -> Iterable[Batch]:
    if side in self._kept:
      return self._kept[side]
    index, count = sharding.process_slot(mesh)
    batches = getattr(self, side).eval_batches(
      self.batch_size, process_index=index, process_count=count
    )
    if self.cache:
      batches = self._kept[side] = list(batches)
    return batches


def pixel_features(batches: Iterable[Batch], size: int) -> Embedded:
  """Return clips shrunk to `size` x `size` and flattened, in [0, 1].

  The embeddings are f32 [n, T * size * size * 3].
  """
  return embed(_Pixels(size), {}, batches)


@dataclasses.dataclass(frozen=True)
class _Pixels:
  """Embed a clip as its shrunken pixels."""

  size: int

  def embed(self, params: PyTree, batch: Batch) -> jax.Array:
    """Return f32 [B, T * size * size * 3]."""
    del params
    b, t, _, _, c = batch['video'].shape
    video = batch['video'].astype(jnp.float32) / 255.0
    shape = (b, t, self.size, self.size, c)
    return jax.image.resize(video, shape, 'linear').reshape(b, -1)
