"""Evaluate on everything available and write one page about it."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from vfm_jax import sharding, verbs
from vfm_jax.evals import report, report_data, store
from vfm_jax.evals.base import InRun
from vfm_jax.evals.embedding_maps import EmbeddingMaps
from vfm_jax.evals.knn import KNN
from vfm_jax.evals.linear import LinearProbe
from vfm_jax.evals.outcome import Detailed, Outcome
from vfm_jax.evals.report_planes import NO_AXES, Axes
from vfm_jax.evals.stored import StoredEvaluation
from vfm_jax.evals.stored_probes import StoredProbe
from vfm_jax.experiment import Experiment

# Folder of the results in a work directory, and name of the page.
RESULTS = 'results'
PAGE = 'report.html'


def write(
  exp: Experiment | StoredEvaluation | None,
  workdir: str,
  *,
  model: str,
  runs: Sequence[tuple[str, str]] = (),
  axes: Axes = NO_AXES,
  sampling: store.Sampling = 'uniform',
) -> pathlib.Path:
  """Evaluate, if there is something to, and write `workdir/report.html`.

  The page shows all of `workdir/results` and of the results of `runs`.

  Args:
    exp: an experiment is evaluated as `evaluate` says; a stored evaluation
      runs; None shows the results that are there.
    workdir: of the run.
    model: name of the encoder of an experiment.
    runs: (model, work directory) of further runs; several of one model are
      its seeds, and become mean and spread.
    axes: which of the numbers go on a plane of their own.
    sampling: how the recipe's `embed` places clips.

  Raises:
    ReportDataError: there are no results, or a file of them is wrong.
    CheckpointError: the work directory holds no checkpoint of this model.
    StoreError: a store is not as it should be.
  """
  if isinstance(exp, Experiment):
    evaluate(exp, workdir, model=model, sampling=sampling)
  elif exp is not None:
    exp.run(workdir)
  results = report_data.load_folder(f'{workdir}/{RESULTS}')
  for name, folder in runs:
    found = report_data.load_folder(f'{folder}/{RESULTS}')
    if not found:
      raise report_data.ReportDataError(
        f'{folder}/{RESULTS}: no results of the run {name!r}; change --runs, '
        'or evaluate it first'
      )
    results += [dataclasses.replace(r, model=name) for r in found]
  return report.write(pathlib.Path(workdir, PAGE), results, axes=axes)


def evaluate(
  exp: Experiment,
  workdir: str,
  *,
  model: str,
  sampling: store.Sampling = 'uniform',
) -> None:
  """Write to `workdir/results` all that can be found out about a checkpoint.

  Every evaluator of the recipe runs; and if the recipe embeds a training and a
  validation split, so do kNN, the offline linear probe and the maps, for each
  label.

  Raises:
    CheckpointError: the work directory holds no checkpoint of this model.
  """
  mesh = sharding.make_mesh(exp.mesh)
  with sharding.activations(mesh):
    params = exp.eval_params(exp.restore(workdir, mesh))
    for name, evaluator in exp.evals.items():
      if isinstance(evaluator, InRun):
        evaluator = evaluator.in_run(workdir, name)
      _outcome(evaluator, exp, params, mesh).save(
        f'{workdir}/{RESULTS}', name, title=name, model=model
      )
  if {'train', 'val'} <= set(exp.embed):
    verbs.embed(exp, workdir, dataset=_DATASET, sampling=sampling)
    bank = exp.embed['train'].num_examples
    StoredEvaluation(
      root=os.path.join(workdir, 'embeddings'),
      dataset=_DATASET,
      evaluators={
        f'{kind}-{label}': evaluator
        for label in exp.embed['train'].source.label_names
        for kind, evaluator in _probes(label, sampling, bank).items()
      },
      model=model,
      seed=exp.seed,
    ).run(workdir, mesh)


_DATASET = 'embedded'
_NEIGHBOURS = 20


def _probes(label: str, sampling: store.Sampling, bank: int) -> dict[str, Any]:
  where: dict[str, Any] = dict(label=label, sampling=sampling)
  knn = KNN(k=min(_NEIGHBOURS, bank))
  return dict(
    knn=StoredProbe(probe=knn, **where),
    linear=StoredProbe(probe=LinearProbe(fit_batch=True), **where),
    maps=EmbeddingMaps(picture=False, **where),
  )


def _outcome(evaluator, exp, params, mesh) -> Outcome:
  """Run an evaluator; one that tells its scalars alone has them by name."""
  if isinstance(evaluator, Detailed):
    return evaluator.evaluate(exp.objective, params, seed=exp.seed, mesh=mesh)
  found = evaluator.run(exp.objective, params, seed=exp.seed, mesh=mesh)
  return Outcome(
    metrics=[
      report_data.Metric(
        name=name,
        value=float(value),
        protocol='see the name',
        unit='fraction' if _FRACTION.search(name) else 'plain',
      )
      for name, value in found.items()
    ]
  )


_FRACTION = re.compile(r'_(top[15]|accuracy)$')
