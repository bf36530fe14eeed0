"""Test a classifier on several views of each video."""

import dataclasses
from typing import Any

import jax
import numpy as np

from vfm_jax import sharding
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.evals import outcome as outcome_lib
from vfm_jax.evals.base import Keeps, top1
from vfm_jax.evals.embed import embed
from vfm_jax.evals.outcome import Outcome
from vfm_jax.evals.report_data import Metric
from vfm_jax.objectives.base import Batch, PyTree


@dataclasses.dataclass(frozen=True)
class MultiView(Keeps):
  """Average the probabilities of a classifier over the views of a video.

  The test of VideoMAE's fine-tuning (arXiv:2203.12602): 5 clips of 3 crops on
  Kinetics, 2 x 3 on SSv2; and of the TWLV-I report's probes.

  Attributes:
    data: the videos; `views` of it is clips times crops.
    label: name of the label.
    batch_size: views at a time.
  """

  data: Pipeline
  label: str
  batch_size: int = 32

  def run(
    self, objective: Any, params: PyTree, *, seed: int, mesh: Any = None
  ) -> dict[str, float]:
    """Return top-1 and top-5 of the averaged probabilities."""
    return self.evaluate(objective, params, seed=seed, mesh=mesh).scalars

  def evaluate(
    self, objective: Any, params: PyTree, *, seed: int, mesh: Any = None
  ) -> Outcome:
    """Return top-1, top-5 and the confusions.

    Raises:
      TypeError: the objective has no `logits`.
      ValueError: the data has no such label.
    """
    del seed
    if not hasattr(objective, 'logits'):
      raise TypeError(
        f'{type(objective).__name__} has no logits(params, batch); expected an '
        'objective such as Classify'
      )
    wrapped = self._kept.get('wrapped')
    if wrapped is None or wrapped.objective is not objective:
      wrapped = self._kept['wrapped'] = _Probabilities(objective)
    slot, slots = sharding.process_slot(mesh)
    with self.data.eval_batches(
      self.batch_size, process_index=slot, process_count=slots
    ) as batches:
      views = embed(wrapped, params, batches, mesh=mesh).features(self.label)
    p = average(views.x, views.video)
    best = np.argsort(-p, axis=1, kind='stable')[:, :5]
    name = f'{self.label}_views{self.data.views}'
    protocol = f'softmax averaged over {self.data.views} views of a video'
    scores = dict(
      top1=top1(p, views.y),
      top5=float((best == views.y[:, None]).any(1).mean()),
    )
    seen = outcome_lib.confusion(name, views.y, best[:, 0], p.shape[1])
    return Outcome(
      metrics=[Metric(f'{name}_{k}', v, protocol) for k, v in scores.items()],
      confusions=(seen,),
    )


def average(probabilities: np.ndarray, video: np.ndarray) -> np.ndarray:
  """Return the mean row of each video: [V, K] and int [V] give [n, K]."""
  total = np.zeros((video[-1] + 1, probabilities.shape[1]))
  np.add.at(total, video, probabilities)
  return total / np.bincount(video)[:, None]


@dataclasses.dataclass(frozen=True)
class _Probabilities:
  """Embed a clip as the probabilities of its classes."""

  objective: Any

  def embed(self, params: PyTree, batch: Batch) -> jax.Array:
    """Return f32 [B, K]."""
    return jax.nn.softmax(self.objective.logits(params, batch))
