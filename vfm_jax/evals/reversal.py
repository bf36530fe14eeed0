"""Test whether embeddings tell a clip from the same clip played in reverse.

The TWLV-I report (arXiv:2408.11318) draws clips of one SSv2 class, "Moving
something up", and their reversed copies after LDA, and looks whether they
part. The number is ours: accuracy of LDA on forward against reverse in a
grouped cross-validation, and the Fisher ratio. Chance is 0.5, exactly, for an
encoder that does not see order.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vfm_jax import sharding
from vfm_jax.data.chosen import WithLabel
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.evals.base import Keeps
from vfm_jax.evals.embed import embed
from vfm_jax.evals.embedding_maps import embedding_map
from vfm_jax.evals.outcome import Outcome
from vfm_jax.evals.report_data import Metric
from vfm_jax.objectives.base import Batch, Embeds, PyTree


class Separation(NamedTuple):
  """Hold how well forward and reverse part.

  Attributes:
    accuracy: of held-out clips, in [0, 1].
    fisher: (m_f - m_r)^T S_w^-1 (m_f - m_r), on all clips.
    axis: float64 [2 n] place of each forward, then each reversed clip on the
      discriminant of all clips.
  """

  accuracy: float
  fisher: float
  axis: np.ndarray


@dataclasses.dataclass(frozen=True)
class ReversalTest(Keeps):
  """Embed clips both ways and tell them apart; satisfies `Evaluator`.

  Attributes:
    data: the clips; on SSv2 the validation videos.
    label: a label of the data, tested class by class; None tests all clips at
      once, which needs one direction of motion in all of them.
    classes: classes of `label` to test.
    name: of the data, first part of the names of the metrics.
    folds: of the cross-validation.
    tolerance: difference of the two embeddings of a clip, relative to the
      root mean square of all, up to which they count as equal: what summing
      in another order may change.
    batch_size: clips embedded at a time.
  """

  data: Pipeline
  label: str | None = None
  classes: tuple[int, ...] = ()
  name: str = 'reversal'
  folds: int = 5
  tolerance: float = 1e-4
  batch_size: int = 32

  def __post_init__(self):
    if (self.label is None) != (not self.classes):
      raise ValueError(
        'reversal.label and reversal.classes go together, found '
        f'{self.label!r} and {self.classes}'
      )
    if self.folds < 2:
      raise ValueError(f'reversal.folds must be 2 or more, found {self.folds}')

  def run(
    self,
    objective: Any,
    params: PyTree,
    *,
    seed: int,
    mesh: jax.sharding.Mesh | None = None,
  ) -> dict[str, float]:
    """Return accuracy and Fisher ratio of each class; see `evaluate`."""
    return self.evaluate(objective, params, seed=seed, mesh=mesh).scalars

  def evaluate(
    self,
    objective: Any,
    params: PyTree,
    *,
    seed: int,
    mesh: jax.sharding.Mesh | None = None,
  ) -> Outcome:
    """Return accuracy, Fisher ratio and the discriminant of each class.

    Args:
      objective: one that satisfies `Embeds`.
      params: its parameters.
      seed: of the folds.
      mesh: embeds over it; None uses one device.

    Raises:
      TypeError: the objective does not embed.
      ValueError: a class has fewer clips than there are folds.
    """
    if not isinstance(objective, Embeds):
      raise TypeError(
        f'{type(objective).__name__} has no embed(params, batch); see Embeds '
        'in vfm_jax/objectives/base.py'
      )
    slot, slots = sharding.process_slot(mesh)
    metrics, maps = [], []
    for c in self.classes or (None,):
      data, name = self.data, self.name
      if c is not None:
        name = f'{name}_{self.label}{c}'
        only = WithLabel(data.source, str(self.label), (c,))
        data = dataclasses.replace(data, source=only)
        if len(only) < self.folds:
          raise ValueError(
            f'reversal.classes: {len(only)} clips of class {c}, '
            f'{self.folds} folds need at least {self.folds}'
          )
      batches = data.eval_batches(
        self.batch_size, process_index=slot, process_count=slots
      )
      found = embed(_BothWays(objective), params, batches, mesh=mesh)
      forward, reverse = np.split(found.x, 2, axis=1)
      result = separate(
        forward,
        reverse,
        found.index,
        folds=self.folds,
        tolerance=self.tolerance,
        seed=seed,
      )
      name = f'{name}_reversal_lda{self.folds}fold'
      how = (
        f'{len(forward)} clips and their reversed copies, LDA with automatic '
        f'shrinkage, {self.folds} folds grouped by video; chance 0.5'
      )
      metrics += [
        Metric(f'{name}_accuracy', result.accuracy, how),
        Metric(f'{name}_fisher', result.fisher, how, unit='plain'),
      ]
      ids = [str(i) for i in found.index]
      maps.append(
        embedding_map(
          name,
          result.axis[:, None],
          np.repeat([0, 1], len(forward)),
          [*ids, *(f'{i}, reversed' for i in ids)],
          classes={0: 'forward', 1: 'reversed'},
          note='LDA; the height of a point means nothing.',
        )
      )
    return Outcome(metrics=tuple(metrics), maps=tuple(maps))


def separate(
  forward: np.ndarray,
  reverse: np.ndarray,
  video: np.ndarray,
  *,
  folds: int = 5,
  tolerance: float = 1e-4,
  seed: int = 0,
) -> Separation:
  """Tell the embeddings of clips from those of their reversed copies.

  A clip and its copy are always in the same fold. Where the two embeddings are
  equal they get one answer, of which one half is right.

  Args:
    forward: [n, D] embeddings of the clips.
    reverse: [n, D] of the copies, in the same order.
    video: int [n] video that a clip is of; all its clips share a fold.
    folds: number of folds.
    tolerance: see `ReversalTest`.
    seed: of the folds.

  Raises:
    ValueError: the shapes differ, or there are fewer videos than folds.
  """
  if forward.shape != reverse.shape or len(video) != len(forward):
    raise ValueError(
      'expected clips, copies and videos of one length, found '
      f'{forward.shape}, {reverse.shape} and {len(video)}'
    )
  groups = np.unique(video)
  if len(groups) < folds:
    raise ValueError(
      f'{folds} folds need at least as many videos, found {len(groups)}'
    )
  f, r = (np.asarray(x, np.float64) for x in (forward, reverse))
  scale = np.sqrt(np.mean(np.square(np.stack([f, r]))))
  same = np.abs(f - r).max(1) <= tolerance * scale
  r = np.where(same[:, None], f, r)
  order = np.random.default_rng(seed).permutation(groups)
  place = np.argsort(order)[np.searchsorted(groups, video)]
  fold = place % folds
  right = 0
  for k in range(folds):
    test = fold == k
    weights, offset, _ = _lda(f[~test], r[~test])
    as_forward = f[test] @ weights + offset > 0
    as_reverse = np.where(
      same[test], ~as_forward, r[test] @ weights + offset <= 0
    )
    right += as_forward.sum() + as_reverse.sum()
  weights, offset, fisher = _lda(f, r)
  return Separation(
    accuracy=float(right / (2 * len(f))),
    fisher=fisher,
    axis=np.concatenate([f, r]) @ weights + offset,
  )


def _lda(f: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, float, float]:
  """Return weights [D], offset, and the Fisher ratio of f and r, [n, D]."""
  from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

  y = np.repeat([1, 0], len(f))
  lda = LinearDiscriminantAnalysis(solver='lsqr', shrinkage='auto')
  lda.fit(np.concatenate([f, r]), y)
  gap = f.mean(0) - r.mean(0)
  weights = np.linalg.lstsq(lda.covariance_, gap, rcond=None)[0]
  middle = (f.mean(0) + r.mean(0)) / 2
  return weights, float(-middle @ weights), float(gap @ weights)


@dataclasses.dataclass(frozen=True)
class _BothWays:
  """Embed a clip and its reversed copy, side by side."""

  objective: Embeds

  def embed(self, params: PyTree, batch: Batch) -> jax.Array:
    """Return f32 [B, 2 D]."""
    reverse = {**batch, 'video': batch['video'][:, ::-1]}
    both = (self.objective.embed(params, b) for b in (batch, reverse))
    return jnp.concatenate(list(both), -1)
