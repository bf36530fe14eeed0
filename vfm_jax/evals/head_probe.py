"""Report what heads on a frozen encoder come to, the whole grid."""

import abc
import dataclasses
from typing import Any, Literal

import jax
import numpy as np
from flax import linen as nn

from vfm_jax.data.pipeline import Pipeline
from vfm_jax.evals import heads
from vfm_jax.evals.head_steps import Reads
from vfm_jax.evals.heads import Trained, Training
from vfm_jax.evals.outcome import Outcome, confusion
from vfm_jax.evals.report_data import Metric
from vfm_jax.objectives.base import PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadProbe(abc.ABC):
  """Share what the linear and the attentive probe have in common.

  Satisfies `Evaluator`. With several settings in the grid the best is chosen
  on `val`, and its name says of how many; every setting is reported besides.

  Attributes:
    train: clips to learn from, one a video.
    val: clips to score on; the probabilities of a video's views are averaged.
    labels: names in `batch['labels']`, each probed on its own.
    training: how the heads learn.
    eval_batch: clips encoded at a time in evaluations.
    benchmark: column of the report's table that the numbers stand beside;
      None where they are not comparable.
  """

  train: Pipeline
  val: Pipeline
  labels: tuple[str, ...]
  training: Training
  eval_batch: int = 32
  benchmark: str | None = None

  def __post_init__(self):
    if not self.labels:
      raise ValueError('probe.labels: expected at least one label, found none')
    self.training.batch_of(self.train.num_examples)

  @property
  @abc.abstractmethod
  def reads(self) -> Reads:
    """What the head reads."""

  @property
  @abc.abstractmethod
  def task(self) -> Literal['lp', 'ap']:
    """Table of the report that the numbers stand in."""

  @property
  @abc.abstractmethod
  def name(self) -> str:
    """Protocol name that metric names carry."""

  @abc.abstractmethod
  def head(self, num_classes: int) -> nn.Module:
    """Return the head."""

  def run(
    self,
    objective: Any,
    params: PyTree,
    *,
    seed: int,
    mesh: jax.sharding.Mesh | None = None,
  ) -> dict[str, float]:
    """Return top-1 fractions; see `evaluate`."""
    return self.evaluate(objective, params, seed=seed, mesh=mesh).scalars

  def evaluate(
    self,
    objective: Any,
    params: PyTree,
    *,
    seed: int,
    mesh: jax.sharding.Mesh | None = None,
  ) -> Outcome:
    """Return the best top-1 of the grid, the grid, and the confusions.

    Args:
      objective: frozen; one that gives what the head reads.
      params: its parameters.
      seed: of the heads, the order and the augmentation.
      mesh: devices to split batches over; None uses one.

    Raises:
      TypeError, ValueError: see `heads.train_heads`.
    """
    found = heads.train_heads(
      objective,
      params,
      self.head,
      self.train,
      self.val,
      self.labels,
      self.training,
      reads=self.reads,
      eval_batch=self.eval_batch,
      seed=seed,
      mesh=mesh,
    )
    metrics, confusions = [], []
    for label, trained in found.items():
      best = int(trained.top1.argmax())
      metrics += self._metrics(label, trained, best)
      confusions.append(
        confusion(
          metrics[-len(self._settings)].name,
          trained.y,
          trained.probabilities[best].argmax(-1),
          trained.probabilities.shape[-1],
        )
      )
    return Outcome(metrics=tuple(metrics), confusions=tuple(confusions))

  @property
  def _settings(self) -> tuple[tuple[float, float], ...]:
    """Settings that get a number: the best alone where there is one."""
    grid = self.training.grid
    return grid if len(grid) == 1 else (grid[0], *grid)

  def _metrics(self, label: str, trained: Trained, best: int) -> list[Metric]:
    t, grid = self.training, self.training.grid
    views = '' if self.val.views == 1 else f'_{self.val.views}views'
    name = f'{label}_{self.name}{t.epochs}ep{views}'
    how = (
      f'frozen encoder, {"fixed" if t.cache else "augmented"} clips, '
      f'batch {t.batch_of(self.train.num_examples)}, {t.epochs} epochs'
      f'{f" ({t.warmup_epochs} of warm-up)" if t.warmup_epochs else ""}, '
      f'{self.val.views} views at test'
    )

    def metric(suffix, at, note, comparable=False):
      lr, wd = grid[at]
      return Metric(
        f'{name}{suffix}_top1',
        float(trained.top1[at]),
        f'{how}; lr {lr:g}, weight decay {wd:g}{note}',
        task=self.task if comparable else 'other',
        benchmark=self.benchmark if comparable else None,
      )

    if len(grid) == 1:
      return [metric('', 0, '', comparable=True)]
    chosen = f', the best of {len(grid)} settings on the videos scored'
    return [
      metric(f'_best_of_{len(grid)}', best, chosen, comparable=True),
      *(
        metric(f'_lr{lr:g}_wd{wd:g}', i, _diverged(trained, i))
        for i, (lr, wd) in enumerate(grid)
      ),
    ]


def _diverged(trained: Trained, at: int) -> str:
  fine = np.isfinite(trained.probabilities[at]).all()
  return '' if fine else '; it diverged and counts as 0'
