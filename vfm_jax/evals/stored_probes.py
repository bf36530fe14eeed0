"""Probe stored embeddings of labelled videos: nearest neighbours and linear."""

import dataclasses
import types
from typing import Any, Literal

import numpy as np

from vfm_jax.evals import outcome as outcome_lib
from vfm_jax.evals import store
from vfm_jax.evals.base import class_count
from vfm_jax.evals.knn import KNN
from vfm_jax.evals.linear import LinearProbe
from vfm_jax.evals.outcome import Outcome
from vfm_jax.evals.published import table
from vfm_jax.evals.report_data import Metric
from vfm_jax.evals.stored import StoredSet

Rows = Literal['video', 'clip']

# Names of the report's benchmarks, by those of the published archives.
BENCHMARKS = types.MappingProxyType(
  {
    'Kinetics400': 'K400',
    'sthsth-v2': 'SSv2',
    'Diving48': 'DV48',
    'MomentsInTime': 'MiT',
  }
)


@dataclasses.dataclass(frozen=True)
class StoredProbe:
  """Classify the videos of a store; satisfies `StoredEvaluator`.

  The columns of the report's kNN table (arXiv:2408.11318, Table 6) are:
  Uniform, `sampling='uniform'`; Clip, `sampling='multi-clip'` and
  `rows='clip'`; Video, `sampling='multi-clip'` and `rows='video'`.

  Attributes:
    probe: `KNN`, or the offline `LinearProbe`. Its numbers are not those of
      the report's linear probe, which has the encoder in the loop.
    sampling: level of the layout that is read; None where it has none.
    rows: `video` takes one vector a video (`_v`), `clip` all its clips (`_c`).
    train_rows: the same for what is learned from; None is `rows`.
    label: `annotation`, or a name in the `labels` of the json.
    seeds: one run each, reported as mean and spread; () is one run with the
      seed of the evaluation. The official scripts have 12 for kNN and 1212
      for the linear probe.
  """

  probe: KNN | LinearProbe = KNN()
  sampling: store.Sampling | None = 'uniform'
  rows: Rows = 'video'
  train_rows: Rows | None = None
  label: str = 'annotation'
  seeds: tuple[int, ...] = ()

  def metric_name(self, dataset: str) -> str:
    """Return the name that carries the protocol."""
    learned = self.train_rows or self.rows
    rows = self.rows if learned == self.rows else f'{learned}-to-{self.rows}'
    label = [] if self.label == 'annotation' else [self.label]
    sampling = [] if self.sampling is None else [self.sampling]
    kind = 'offline_' if isinstance(self.probe, LinearProbe) else ''
    parts = [dataset, *label, *sampling, rows, f'{kind}{self.probe.name}']
    return '_'.join([*parts, 'top1'])

  def run_stored(
    self, data: StoredSet, *, seed: int, mesh: Any = None
  ) -> Outcome:
    """Return the top-1 fraction and the confusions.

    Raises:
      StoreError: a file is missing or wrong, or a label out of range; the
        message names the file.
      ValueError: the bank has fewer than k rows, or no batch is full.
    """
    train = data.split('train', self.sampling).features(
      self.train_rows or self.rows, self.label
    )
    reader = data.split('val', self.sampling)
    val = reader.features(self.rows, self.label)
    if train.x.shape[1] != val.x.shape[1]:
      raise store.StoreError(
        f'{reader.folder}: {val.x.shape[1]} features, those of train have '
        f'{train.x.shape[1]}'
      )
    bound = data.class_bound if self.label == 'annotation' else None
    classes = bound or class_count(train, val)
    over = {'mesh': mesh} if isinstance(self.probe, KNN) else {}
    results = [
      self.probe.run(train, val, classes, seed=s, **over)
      for s in self.seeds or (seed,)
    ]
    scores = np.array([r.top1 for r in results])
    name = self.metric_name(data.dataset)
    metric = Metric(
      name=name,
      value=float(scores.mean()),
      protocol=self._protocol(len(train.x)),
      spread=float(scores.std(ddof=1)) if len(scores) > 1 else None,
      runs=len(scores),
      task='knn' if isinstance(self.probe, KNN) else 'other',
      benchmark=self._benchmark(data.dataset),
    )
    seen = outcome_lib.confusion(name, val.y, results[0].predictions, classes)
    return Outcome(metrics=(metric,), confusions=(seen,))

  def _protocol(self, bank: int) -> str:
    read = f'{self.sampling or "unnamed"} sampling, {self.rows} vectors'
    if isinstance(self.probe, KNN):
      k, t = self.probe.k, self.probe.temperature
      return (
        f'{read}; cosine kNN, k = {k}, T = {t:g}, {bank:,} rows in the bank'
      )
    p = self.probe
    return (
      f'{read}; offline linear layer, Adam, lr {p.lr:g}, batch {p.batch}, '
      f'{p.epochs} epochs'
    )

  def _benchmark(self, dataset: str) -> str | None:
    """Return the column of the report that has this protocol, if any."""
    columns = {
      ('uniform', 'video'): 'uniform',
      ('uniform', 'clip'): 'uniform',
      ('multi-clip', 'clip'): 'clip',
      ('multi-clip', 'video'): 'video',
    }
    published = (
      isinstance(self.probe, KNN)
      and (self.probe.k, self.probe.temperature) == (200, 0.1)
      and self.train_rows in (None, self.rows)
      and self.label == 'annotation'
    )
    column = columns.get((self.sampling or '', self.rows))
    bench = BENCHMARKS.get(dataset)
    name = f'{bench} {column}'
    return name if published and name in table('knn').columns else None
