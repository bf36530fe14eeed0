"""Define the config contract of a run and what every verb derives from it."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vfm_jax import checkpoint as checkpoint_lib
from vfm_jax import multitask, sharding, trees
from vfm_jax import step as step_lib
from vfm_jax.data import pipeline
from vfm_jax.data.latent_pipeline import LatentPipeline
from vfm_jax.data.mixed import Mixed
from vfm_jax.evals import base as evals_base
from vfm_jax.objectives import base as objectives_base
from vfm_jax.objectives import frozen
from vfm_jax.optim import Optimizer, Row


@dataclasses.dataclass(frozen=True)
class Data:
  """Say what is trained on.

  Attributes:
    train: the training examples.
    val: held-out examples, for the pictures; `train` is shown without it.
    workers: processes that prepare batches; 0 prepares them in threads of
      this process, which starts at once and suits small sets.
  """

  train: pipeline.Pipeline | LatentPipeline | Mixed
  val: pipeline.Pipeline | LatentPipeline | None = None
  workers: int = 0


@dataclasses.dataclass(frozen=True)
class Checkpoints:
  """Say when the state is saved and what is kept; see `Checkpointer`."""

  every_steps: int = 1000
  every_minutes: float | None = None
  keep_last: int = 3
  keep_every_steps: int | None = None


@dataclasses.dataclass(frozen=True)
class WarmStart:
  """Say which other run the parameters come from; see `warm_start`.

  Attributes:
    workdir: work directory of the other run.
    step: its checkpoint; the latest by default.
    item: `params`, or `ema/<decay>` for an average.
    mapping: (regex, replacement) pairs from its paths to ours.
    fresh: regexes of our paths that may keep their initial values.
    ignore: regexes of its paths that may stay unused.
  """

  workdir: str
  step: int | None = None
  item: str = 'params'
  mapping: tuple[tuple[str, str], ...] = ()
  fresh: tuple[str, ...] = ()
  ignore: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Hold everything that a verb needs; one recipe builds one of these.

  Attributes:
    objective: what is trained; see `objectives.base.Objective`.
    data: what it is trained on.
    optim: optimizer, schedule and parameter groups.
    batch_size: clips a step, over all devices and hosts.
    steps: length of the run; or give `epochs`.
    epochs: length of the run in passes over `data.train`.
    seed: of parameters, masks, order and augmentation.
    accum: microbatches that a batch is cut into.
    combine: makes one gradient of the objective's tasks, see `multitask`; None
      adds their losses.
    ema: decays of the averages of the parameters to keep.
    eval_ema: the average that evaluations use; by default the parameters, or
      what the objective has in their place, see `objectives.base.Averages`.
    mesh: how devices are arranged.
    rules: (path pattern, axes) table for the whole state; first match wins.
    warm_start: another run to take parameters from at step 0.
    checkpoint: when to save and what to keep.
    evals: evaluators by name; their metrics are reported as `name/metric`.
    eval_every: steps between evaluations; 0 evaluates at the end only.
    eval_at_start: also evaluate the initial parameters.
    embed: examples of each split that the `embed` verb writes.
    latents: pictures of each split that the `latents` verb encodes.
    log_every: steps between reports.
    max_skipped: non-finite steps in a row that stop the run.
    watchdog_s: seconds without a finished step that are reported; 0 is off.
    profile: (first, last) step to profile.
    wandb: project name on Weights & Biases.
  """

  objective: objectives_base.Objective
  data: Data
  optim: Optimizer
  batch_size: int
  steps: int | None = None
  epochs: float | None = None
  seed: int = 0
  accum: int = 1
  combine: multitask.Combiner | None = None
  ema: tuple[float, ...] = ()
  eval_ema: float | None = None
  mesh: sharding.Mesh = sharding.Mesh()
  rules: tuple[sharding.Rule, ...] = sharding.RULES
  warm_start: WarmStart | None = None
  checkpoint: Checkpoints = Checkpoints()
  evals: Mapping[str, evals_base.Evaluator] = dataclasses.field(
    default_factory=dict
  )
  eval_every: int = 0
  eval_at_start: bool = False
  embed: Mapping[str, pipeline.Pipeline] = dataclasses.field(
    default_factory=dict
  )
  latents: Mapping[str, pipeline.Pipeline] = dataclasses.field(
    default_factory=dict
  )
  log_every: int = 20
  max_skipped: int = 10
  watchdog_s: float = 0.0
  profile: tuple[int, int] | None = None
  wandb: str | None = None

  def __post_init__(self):
    """Refuse what cannot run before anything is allocated."""
    if (self.steps is None) == (self.epochs is None):
      raise ValueError(
        'give exactly one of config.steps and config.epochs, found '
        f'steps={self.steps} and epochs={self.epochs}'
      )
    if self.batch_size < 1 or self.batch_size % self.accum:
      raise ValueError(
        f'config.batch_size={self.batch_size} must be a positive multiple of '
        f'config.accum={self.accum}'
      )
    if self.log_every < 1:
      raise ValueError(f'config.log_every={self.log_every} must be positive')
    if bad := [d for d in self.ema if not 0 < d < 1]:
      raise ValueError(f'config.ema: decays lie in (0, 1), found {bad}')
    if self.eval_ema is not None and self.eval_ema not in self.ema:
      raise ValueError(
        f'config.eval_ema={self.eval_ema:g} is not kept; config.ema is '
        f'{self.ema}'
      )
    if self.combine is not None and getattr(self.objective, 'tasks', 0) is None:
      raise ValueError(
        'config.combine makes one gradient of several tasks: expected '
        'config.objective.tasks, as in ref(uniform, count=8), found None'
      )

  @functools.cached_property
  def total_steps(self) -> int:
    """Return the length of the run in steps."""
    if self.steps is not None:
      return self.steps
    assert self.epochs is not None
    return math.ceil(
      self.epochs * self.data.train.num_examples / self.batch_size
    )

  @functools.cached_property
  def batch_spec(self) -> dict[str, Any]:
    """Return shapes and types of the global batch."""
    return self.data.train.element_spec(self.batch_size)

  @functools.cached_property
  def optimizer(self) -> tuple[optax.GradientTransformation, tuple[Row, ...]]:
    """Return the optimizer and its parameter table.

    Raises:
      ValueError: what `combine` learns is frozen, or see `Optimizer.build`.
    """
    params, _ = jax.eval_shape(self._init_params)
    tx, rows = self.optim.build(params, self.total_steps)
    held = {r.path: r.group for r in rows if r.frozen and _learned(r.path)}
    if self.combine is not None and held:
      raise ValueError(
        f'config.combine learns {sorted(held)}, which config.optim.groups '
        f'freezes by the pattern {min(held.values())!r}; put '
        f"Group(pattern='^{step_lib.COMBINE}/') before it"
      )
    return tx, rows

  @functools.cached_property
  def abstract_state(self) -> step_lib.TrainState:
    """Return shapes and types of the state, without allocating it."""
    return jax.eval_shape(self.init_state, self.seed)

  def init_state(self, seed: jax.Array | int) -> step_lib.TrainState:
    """Build the state of step 0."""
    return step_lib.init_state(
      self.objective,
      self.optimizer[0],
      seed,
      _zeros(self.data.train.element_spec(1)),
      ema=self.ema,
      combine=self.combine,
    )

  @functools.cached_property
  def teacher_spec(self) -> dict[str, Any]:
    """Return shapes and types of what a step takes beside state and batch.

    Raises:
      ValueError: a teacher has the name of parameters.
    """
    spec = frozen.teacher_spec(self.objective)
    if clash := sorted(spec.keys() & self.abstract_state.params.keys()):
      raise ValueError(
        f'config.objective: {clash} are names of parameters and of teachers'
      )
    return spec

  def teacher_shardings(self, mesh: Any) -> dict[str, Any]:
    """Return the sharding of each leaf of the teachers, by `rules`."""
    rules = [dataclasses.replace(rule, optional=True) for rule in self.rules]
    return sharding.infer(self.teacher_spec, mesh, rules)

  def teachers(self, mesh: Any) -> dict[str, Any]:
    """Read the frozen weights that training needs; {} for most objectives.

    Raises:
      ValueError: the objective names no file of them, or of another model.
    """
    if not isinstance(self.objective, frozen.Taught):
      return {}
    weights = dict(self.objective.teachers())
    return jax.device_put(weights, self.teacher_shardings(mesh))

  def train_step(self) -> step_lib.StepFn:
    """Return the pure step function."""
    tx, rows = self.optimizer
    return step_lib.make_train_step(
      self.objective,
      tx,
      accum=self.accum,
      ema=self.ema,
      combine=self.combine,
      frozen={row.path for row in rows if row.frozen},
    )

  def jitted_step(self, mesh: jax.sharding.Mesh) -> Any:
    """Return the step over a mesh, as the loop runs it.

    It takes (state, batch, teachers) and donates the state. Trace it inside of
    `sharding.activations(mesh)`.
    """
    shardings = self.shardings(mesh)
    return jax.jit(
      self.train_step(),
      in_shardings=(
        shardings,
        sharding.batch_sharding(mesh),
        self.teacher_shardings(mesh),
      ),
      # Metrics are whole on every device, so that each process can read them.
      out_shardings=(shardings, sharding.replicated(mesh)),
      donate_argnums=0,
    )

  def shardings(self, mesh: Any) -> step_lib.TrainState:
    """Return the sharding of each leaf of the state, by `rules`."""
    return sharding.infer(self.abstract_state, mesh, self.rules)

  def checkpointer(
    self,
    workdir: str,
    info: Mapping[str, Any] | None = None,
    *,
    read_only: bool = False,
  ) -> checkpoint_lib.Checkpointer:
    """Open the checkpoints of a work directory."""
    return checkpoint_lib.Checkpointer(
      f'{workdir}/checkpoints',
      **dataclasses.asdict(self.checkpoint),
      info=info,
      read_only=read_only,
    )

  def first_state(self, shardings: step_lib.TrainState) -> step_lib.TrainState:
    """Allocate the state of step 0, warm-started if the config says so."""
    # The seed is an argument, so that runs that differ in it alone share one
    # compiled program.
    state = jax.jit(self.init_state, out_shardings=shardings)(self.seed)
    if self.warm_start is None:
      return state
    w = self.warm_start
    params = checkpoint_lib.warm_start(
      state.params,
      f'{w.workdir}/checkpoints',
      step=w.step,
      item=w.item,
      mapping=w.mapping,
      fresh=w.fresh,
      ignore=w.ignore,
    )
    # The averages start where the parameters do, in buffers of their own.
    copies = {key: jax.tree.map(jnp.copy, params) for key in state.ema}
    extra = state.extra
    if isinstance(self.objective, objectives_base.Averages):
      extra = self.objective.restart(extra, params)
    return state.replace(params=params, ema=copies, extra=extra)

  def restore(self, workdir: str, mesh: Any) -> step_lib.TrainState:
    """Return the latest saved state of a work directory.

    Raises:
      CheckpointError: there is none, or it is of another model.
    """
    # A run may be writing there: its unfinished saves are not ours to clear.
    with self.checkpointer(workdir, read_only=True) as saved:
      if saved.latest_step() is None:
        raise checkpoint_lib.CheckpointError(
          f'no checkpoint in {workdir}/checkpoints; train first, or change '
          '--workdir'
        )
      return saved.restore(self.abstract_state, self.shardings(mesh))

  def eval_params(self, state: step_lib.TrainState) -> Any:
    """Return the parameters that evaluations and embeddings use."""
    if self.eval_ema is None:
      if isinstance(self.objective, objectives_base.Averages):
        return self.objective.evaluated(state.params, state.extra)
      return state.params
    return state.ema[step_lib.ema_key(self.eval_ema)]

  def param_paths(self) -> list[str]:
    """Return the path of each parameter leaf, in leaf order."""
    return [p for p, _ in trees.path_leaves(self.abstract_state.params)]

  def _init_params(self):
    return step_lib.init_params(
      self.objective,
      self.seed,
      _zeros(self.data.train.element_spec(1)),
      combine=self.combine,
    )


def _learned(path):
  return path.startswith(f'{step_lib.COMBINE}/')


def _zeros(spec):
  return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), spec)
