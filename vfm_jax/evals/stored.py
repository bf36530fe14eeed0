"""Evaluate stored embeddings: no encoder, no checkpoint, no video.

A `StoredEvaluation` is what a recipe builds for `eval` over an embedding store
(layout: `evals/store.py`). Each of its evaluators reads the splits that it
needs and returns an `Outcome`, which is written for the report.
"""

import dataclasses
import os
import pathlib
import types
from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import jax

from vfm_jax import sharding
from vfm_jax.evals import store
from vfm_jax.evals.outcome import Outcome

# Classes of the sets for recognition, by their folder names in the published
# archives (repository of the TWLV-I evaluation framework).
CLASS_COUNTS = types.MappingProxyType(
  {
    'Kinetics400': 400,
    'sthsth-v2': 174,
    'Diving48': 48,
    'MomentsInTime': 305,
  }
)


@dataclasses.dataclass(frozen=True)
class StoredSet:
  """Name one data set of a store.

  Attributes:
    root: folder that holds the data sets.
    dataset: folder name of the set, also part of every metric's name.
    num_classes: annotations at or above it are refused; None is the number of
      a published set (`CLASS_COUNTS`), and no bound for others.
  """

  root: str
  dataset: str
  num_classes: int | None = None

  @property
  def class_bound(self) -> int | None:
    """Smallest number that is no class, or None where it is not known."""
    if self.num_classes is not None:
      return self.num_classes
    return CLASS_COUNTS.get(self.dataset)

  def split(
    self, split: Literal['train', 'val'], sampling: store.Sampling | None
  ) -> store.EmbeddingStore:
    """Return the reader of a split; None for a layout without that level."""
    return store.EmbeddingStore(
      self.root, self.dataset, split, sampling, self.class_bound
    )

  def samplings(self) -> list[store.Sampling | None]:
    """Return the samplings that have both splits on disk."""
    samplings: tuple[store.Sampling | None, ...] = (
      'uniform',
      'multi-clip',
      None,
    )
    return [
      sampling
      for sampling in samplings
      if all(self.split(s, sampling).folder.is_dir() for s in ('train', 'val'))
    ]


@runtime_checkable
class StoredEvaluator(Protocol):
  """What `StoredEvaluation` calls: a frozen dataclass of settings.

  Which sampling and which rows it reads are its own fields, and part of the
  names of its metrics: `<dataset>_<sampling>_<protocol>_<measure>`.
  """

  def run_stored(
    self, data: StoredSet, *, seed: int, mesh: Any = None
  ) -> Outcome:
    """Evaluate a stored set.

    Args:
      data: the set; `data.split('train', self.sampling)` reads a split.
      seed: of whatever is drawn.
      mesh: devices to spread work over; None uses one.

    Raises:
      StoreError: a file is missing or wrong; the message names it.
    """
    ...


@dataclasses.dataclass(frozen=True)
class StoredEvaluation:
  """Hold what `eval` does with a store; a recipe builds one of these.

  Attributes:
    root: folder of the store.
    dataset: data set in it.
    evaluators: by name.
    model: name of the encoder behind the embeddings, for the report.
    num_classes: classes of the set; annotations beyond are refused.
    seed: handed to every evaluator.
    mesh: how devices are arranged; evaluators may spread work over them.
  """

  root: str
  dataset: str
  evaluators: Mapping[str, StoredEvaluator]
  model: str = 'encoder'
  num_classes: int | None = None
  seed: int = 0
  mesh: sharding.Mesh = sharding.Mesh()

  def __post_init__(self):
    if not self.evaluators:
      raise ValueError(
        'config.evaluators is empty: give it evaluators by name, as in '
        'evaluators=dict(knn=ref(StoredProbe, probe=ref(KNN)))'
      )

  @property
  def data(self) -> StoredSet:
    """The set that is evaluated."""
    return StoredSet(self.root, self.dataset, self.num_classes)

  def run(
    self, workdir: str | os.PathLike, mesh: Any = None
  ) -> dict[str, float]:
    """Run all evaluators; write `workdir/results/<dataset>-<evaluator>.json`.

    Each file is of the layout of `report_data`, with pictures beside it, and
    appears when its evaluator has finished, whole or not at all.

    Args:
      workdir: where the results go.
      mesh: one that there is already, in place of `self.mesh`.

    Returns:
      All numbers, as `evaluator/metric`.

    Raises:
      StoreError: the store is not as it should be.
      ReportDataError: an evaluator found a number that is not finite.
    """
    if mesh is None:
      mesh = sharding.make_mesh(self.mesh)
    numbers = {}
    for name, evaluator in self.evaluators.items():
      outcome = evaluator.run_stored(self.data, seed=self.seed, mesh=mesh)
      if jax.process_index() == 0:
        outcome.save(
          pathlib.Path(workdir) / 'results',
          f'{self.dataset}-{name}',
          title=f'{self.dataset}, {name}',
          model=self.model,
        )
      numbers |= {f'{name}/{k}': v for k, v in outcome.scalars.items()}
    return numbers
