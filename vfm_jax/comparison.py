"""Train several recipes over the same seeds and set them side by side."""

import dataclasses
import json
import pathlib
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from vfm_jax import config as config_lib
from vfm_jax import sharding, train
from vfm_jax.evals.base import Evaluator
from vfm_jax.evals.difficulty import Difficulty
from vfm_jax.experiment import Experiment

State = Literal['done', 'diverged', 'failed']


class Interrupted(RuntimeError):
  """Say which run was told to stop."""


@dataclasses.dataclass(frozen=True)
class Arm:
  """Name one recipe of a comparison.

  Attributes:
    name: in the table and the figure, and of the folder of its runs.
    experiment: what is run; its seed is replaced.
    note: what it is, for the table.
    start: the arm whose run of the same seed it goes on from: that becomes the
      `workdir` of its `warm_start`. None starts afresh.
  """

  name: str
  experiment: Experiment
  note: str = ''
  start: str | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Say which recipes are compared, and by what; the verb `study` runs them.

  Attributes:
    arms: the recipes; the first is what the others are held against.
    measures: evaluators that the last checkpoint of each run is given, as
      `name/metric`. They are the same objects for all runs, so that what they
      keep, such as a classifier, is made once.
    measure_seed: seed of the measures, the same for all runs.
    levels: name of a `Difficulty` evaluator that all arms have in `evals`: the
      held-out loss is the mean of its intervals. None for arms that do not
      denoise: there is then neither that loss nor its figure.
    planes: by title, the measures (across, up) of a figure in which each arm
      is a point, as in the appearance-versus-motion plane of TWLV-I.
    distance: start of the name of the measure that the figure shows.
    report: where table and figure go, without a suffix; None is `study` in the
      work directory.
    title: of the table.
    about: what all arms have in common, for the table.
  """

  arms: tuple[Arm, ...]
  measures: Mapping[str, Evaluator]
  measure_seed: int = 0
  levels: str | None = 'levels'
  planes: Mapping[str, tuple[str, str]] = dataclasses.field(
    default_factory=dict
  )
  distance: str = ''
  report: str | None = None
  title: str = 'Comparison'
  about: str = ''

  def __post_init__(self):
    """Refuse arms that cannot be run in their order."""
    before: dict[str, Arm] = {}
    for i, arm in enumerate(self.arms):
      path = f'config.arms.{i}'
      if arm.name in before:
        raise ValueError(f'{path}.name: there is another {arm.name!r}')
      evals = arm.experiment.evals
      if self.levels is not None and not isinstance(
        evals.get(self.levels), Difficulty
      ):
        raise ValueError(
          f'{path}.experiment.evals: expected a Difficulty evaluator named '
          f'{self.levels!r} (config.levels), found {sorted(evals)}'
        )
      if arm.start is not None and arm.start not in before:
        raise ValueError(
          f'{path}.start: expected one of the arms before it, '
          f'{list(before)}, found {arm.start!r}'
        )
      if (arm.start is None) != (arm.experiment.warm_start is None):
        raise ValueError(
          f'{path}: expected `start` and `experiment.warm_start` both or '
          f'neither, found {arm.start!r} and {arm.experiment.warm_start}'
        )
      before[arm.name] = arm
    if not before:
      raise ValueError('config.arms: expected at least one, found none')

  def steps_before(self, arm: Arm) -> int:
    """Return the steps of all runs that a run of this arm goes on from."""
    if arm.start is None:
      return 0
    source = next(a for a in self.arms if a.name == arm.start)
    return self.steps_before(source) + source.experiment.total_steps


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Hold how a run ended.

  Attributes:
    state: 'done'; 'diverged', where too many steps in a row were not finite;
      'failed' by any other error.
    fingerprint: of the arm's config.
    measures: fingerprint of what it was measured by.
    steps: of the run; where it diverged or failed, those that it should have.
    parameters: number of them.
    trained: number of those that are not frozen.
    seconds: that training and measuring took, interruptions left out.
    message: the error.
    measured: `name/metric` of the measures.
  """

  state: State
  fingerprint: str
  measures: str
  steps: int
  parameters: int
  trained: int
  seconds: float
  message: str = ''
  measured: Mapping[str, float] = dataclasses.field(default_factory=dict)


def folder_of(workdir: str, arm: Arm, seed: int) -> str:
  """Return the work directory of one run."""
  return f'{workdir}/{arm.name}/seed_{seed}'


def run(
  comparison: Comparison,
  config: config_lib.ConfigDict,
  workdir: str,
  seeds: Sequence[int],
) -> dict[str, list[Outcome]]:
  """Train each arm once a seed in `workdir/<arm>/seed_<seed>`.

  A run that is done or diverged is not run again, but measured again where the
  measures changed; one that failed or was interrupted goes on from its last
  checkpoint. What goes wrong in a run is an
  outcome, and the others are run all the same.

  Args:
    comparison: what to run.
    config: what it was built from.
    workdir: where the runs go.
    seeds: the seeds, at least one.

  Returns:
    The outcomes by arm, in the order of the seeds.

  Raises:
    ValueError: a finished run there is of another config.
    Interrupted: a signal stopped a run, which can be gone on with.
  """
  how = config_lib.ConfigDict(
    dict(measures=config.measures, seed=config.measure_seed)
  )
  measures = config_lib.fingerprint(how)
  nodes: Any = config.arms
  return {
    arm.name: [
      _run(comparison, arm, node.experiment, measures, workdir, seed)
      for seed in seeds
    ]
    for arm, node in zip(comparison.arms, nodes, strict=True)
  }


def _run(comparison, arm, node, measures, workdir, seed) -> Outcome:
  """Return how a run ended, now or before."""
  folder = folder_of(workdir, arm, seed)
  file = pathlib.Path(folder, 'outcome.json')
  # Before the seed and the work directory enter it.
  mark, spent = config_lib.fingerprint(node), 0.0
  if file.exists():
    known = Outcome(**json.loads(file.read_text()))
    spent = known.seconds
    if known.state != 'failed':
      if known.fingerprint != mark:
        raise ValueError(
          f'{folder} holds a finished run of another config of {arm.name!r}; '
          'remove it or change --workdir'
        )
      if known.state == 'diverged' or known.measures == measures:
        return known
  exp, one = _seeded(comparison, arm, node, workdir, seed)
  print(f'--- {arm.name}, seed {seed} ---', flush=True)
  state: State = 'done'
  started, message = time.monotonic(), ''
  sizes, measured = (0, 0), {}
  try:
    sizes = _sizes(exp)
    train.train(exp, folder, config=one)
    measured = _measured(comparison, exp, folder)
  except Interrupted:
    raise
  except train.NonFiniteError as e:
    state, message = 'diverged', str(e)
  except Exception as e:  # of any kind: a result like others, and shown
    traceback.print_exc()
    state, message = 'failed', f'{type(e).__name__}: {e}'
  outcome = Outcome(
    state=state,
    fingerprint=mark,
    measures=measures,
    steps=exp.total_steps,
    parameters=sizes[0],
    trained=sizes[1],
    seconds=spent + time.monotonic() - started,
    message=message,
    measured=measured,
  )
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(json.dumps(dataclasses.asdict(outcome), indent=1))
  return outcome


def _sizes(exp) -> tuple[int, int]:
  """Return the number of parameters, and of those that are trained."""
  rows = exp.optimizer[1]
  sizes = np.array([np.prod(row.shape, dtype=int) for row in rows])
  trained = np.array([not row.frozen for row in rows])
  return int(sizes.sum()), int(sizes[trained].sum())


def _seeded(comparison, arm, node, workdir, seed):
  """Return the experiment of a seed, and its config."""
  one = node.copy_and_resolve_references()
  one.seed = seed
  exp = dataclasses.replace(arm.experiment, seed=seed)
  if arm.start is not None:
    source = next(a for a in comparison.arms if a.name == arm.start)
    where = folder_of(workdir, source, seed)
    one.warm_start.workdir = where
    warm = dataclasses.replace(exp.warm_start, workdir=where)
    exp = dataclasses.replace(exp, warm_start=warm)
  one.lock()
  return exp, one


def _measured(comparison, exp, folder) -> dict[str, float]:
  """Return the measures of a run that has come to its end."""
  mesh = sharding.make_mesh(exp.mesh)
  with sharding.activations(mesh):
    state = exp.restore(folder, mesh)
    if int(state.step) < exp.total_steps:
      raise Interrupted(
        f'{folder} was interrupted at step {int(state.step)} of '
        f'{exp.total_steps}; run the same command again to go on'
      )
    last = dataclasses.replace(
      exp, evals=comparison.measures, seed=comparison.measure_seed
    )
    return train.run_evals(last, exp.eval_params(state), mesh, folder)
