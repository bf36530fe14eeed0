"""Hold what one evaluator found, before it is known whose model it is."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vfm_jax.evals import report_data, store
from vfm_jax.objectives.base import PyTree


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Hold numbers and what is behind them; fields as `report_data.Results`.

  Attributes:
    metrics: numbers; a name carries the protocol behind the number.
    confusions: which class is taken for which.
    maps: embeddings in the plane.
    timelines: predicted segments against the true ones.
    note: what a reader must know of the data.
    pictures: PNG files by name.
    files: contents of further files by name, with its ending; not `.json`,
      which is what results end in.
  """

  metrics: Sequence[report_data.Metric] = ()
  confusions: Sequence[report_data.Confusion] = ()
  maps: Sequence[report_data.EmbeddingMap] = ()
  timelines: Sequence[report_data.Timeline] = ()
  note: str = ''
  pictures: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
  files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)

  @property
  def scalars(self) -> dict[str, float]:
    """The numbers by name, as `Evaluator.run` returns them."""
    return {m.name: float(m.value) for m in self.metrics}

  def save(
    self, folder: str | os.PathLike, name: str, *, title: str, model: str
  ) -> pathlib.Path:
    """Write `<folder>/<name>.json` for the report, and pictures beside it.

    Args:
      folder: of the results; made where it is missing.
      name: of the file, and the first part of those of the pictures.
      title: heading in the report.
      model: name of the encoder.

    Returns:
      The json file; it appears last, whole or not at all.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = store.file_id(name)
    files = {f'{k}.png': v for k, v in self.pictures.items()} | {**self.files}
    for file, content in files.items():
      path = folder / f'{name}-{store.file_id(file)}'
      store.replace(path, lambda f, content=content: f.write(content))
    results = report_data.Results(
      title=title,
      model=model,
      metrics=self.metrics,
      confusions=self.confusions,
      maps=self.maps,
      timelines=self.timelines,
      note=self.note,
    )
    return report_data.save(folder, name, results)


@runtime_checkable
class Detailed(Protocol):
  """Optional for an `Evaluator`: tell more than its numbers."""

  def evaluate(
    self, objective: Any, params: PyTree, *, seed: int, mesh: Any = None
  ) -> Outcome:
    """Return the outcome; `run` returns its scalars."""
    ...


def confusion(
  name: str,
  y: np.ndarray,
  predictions: np.ndarray,
  classes: Sequence[str] | int,
) -> report_data.Confusion:
  """Count predictions [n] of videos of classes y [n].

  Args:
    name: what was classified and how.
    y: int [n] true classes.
    predictions: int [n].
    classes: their names, or how many there are.
  """
  if isinstance(classes, int):
    classes = [str(c) for c in range(classes)]
  counts = np.zeros((len(classes), len(classes)), np.int64)
  np.add.at(counts, (np.asarray(y), np.asarray(predictions)), 1)
  return report_data.Confusion(name, list(classes), counts.tolist())
