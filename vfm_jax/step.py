"""Define the training state and the two pure step functions.

Everything a run is, is in `TrainState`; everything a step does, is a pure
function of it and a batch. The functions know an objective only through its
protocol.
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from vfm_jax.gradients import Passes, fill
from vfm_jax.multitask import Combined, Combiner
from vfm_jax.objectives import base
from vfm_jax.objectives.frozen import teacher_spec

PyTree = Any
Metrics = dict[str, Any]

# Name of a combiner's parameters among those trained.
COMBINE = 'combine'
# What a combiner's key is folded with; the numbers of examples stay below.
_COMBINE_ROW = 2**31 - 1


class TrainState(flax.struct.PyTreeNode):
  """Hold all that a run needs to go on, bit for bit.

  Attributes:
    step: i32 [] number of finished steps.
    params: trainable and frozen parameters of the objective, float32.
    opt_state: state of the optax transformation.
    ema: exponential moving averages of `params`, keyed by their decay.
    extra: non-gradient state of the objective (teachers, queues, stages).
    rng: u32 [2] key data; the key of a step is `fold_in(rng, step)`.
    combine: state without gradient of what combines the tasks.
  """

  step: jax.Array
  params: PyTree
  opt_state: PyTree
  ema: dict[str, PyTree]
  extra: PyTree
  rng: jax.Array
  combine: PyTree = flax.struct.field(default_factory=dict)


StepFn = Callable[..., tuple[TrainState, Metrics]]


def ema_key(decay: float) -> str:
  """Return the name of an average in `TrainState.ema`."""
  return f'{decay:g}'


def init_params(
  objective: base.Objective,
  seed: jax.Array | int,
  batch: base.Batch,
  *,
  combine: Combiner | None = None,
) -> tuple[PyTree, PyTree]:
  """Return (params, extra) for a seed; jit or eval_shape.

  Args:
    objective: what is trained.
    seed: of the parameters.
    batch: of one example or more, for its shapes only.
    combine: its parameters, if it has any, are under 'combine'.
  """
  return _init(objective, seed, batch, combine)[:2]


def init_state(
  objective: base.Objective,
  tx: optax.GradientTransformation,
  seed: jax.Array | int,
  batch: base.Batch,
  *,
  ema: Sequence[float] = (),
  combine: Combiner | None = None,
) -> TrainState:
  """Build the state of step 0; call under `jax.jit` or `jax.eval_shape`.

  Args:
    objective: what is trained.
    tx: optimizer.
    seed: of the parameters and of all randomness of the run.
    batch: arrays or shape structs of one batch, for their shapes only.
    ema: decays of the averages to keep, each in (0, 1).
    combine: as will be given to `make_train_step`.

  Raises:
    ValueError: the objective has parameters of the name of the combiner's.
  """
  params, extra, combined = _init(objective, seed, batch, combine)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=tx.init(params),
    # Copies: a donated state must not hold one buffer twice.
    ema={ema_key(d): jax.tree.map(jnp.copy, params) for d in ema},
    extra=extra,
    rng=jax.random.key_data(_stream(jax.random.key(seed), 'train')),
    combine=combined,
  )


def make_train_step(
  objective: base.Objective,
  tx: optax.GradientTransformation,
  *,
  accum: int = 1,
  ema: Sequence[float] = (),
  combine: Combiner | None = None,
  frozen: Collection[str] = (),
  skip_nonfinite: bool = True,
) -> StepFn:
  """Return the pure function (state, batch[, teachers]) -> (state, metrics).

  Gradient accumulation is exact: the loss is sum_k sums_k / counts_k + aux
  with sums and counts added over the microbatches first; `combine` does other
  things with the K tasks. `teachers` are trees by name that the objective finds
  beside its parameters, see `objectives.frozen.Taught`.

  Args:
    objective: what is trained.
    tx: optimizer.
    accum: number of microbatches that one batch is cut into.
    ema: decays, as given to `init_state`.
    combine: makes one gradient of the tasks, see `multitask`, and has been
      given to `init_state`; None adds their losses.
    frozen: paths of the parameters that `tx` never moves: their gradients are
      zeros, and cost nothing.
    skip_nonfinite: leave the state as it is when the loss or a gradient is
      not finite; `metrics['finite']` says for each parameter leaf (bool, in
      the order of `jax.tree.leaves(params)`) whether its gradient was.
  """

  def step(
    state: TrainState,
    batch: base.Batch,
    teachers: Mapping[str, PyTree] | None = None,
  ):
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    params = state.params
    if combine is not None:
      params = {k: v for k, v in params.items() if k != COMBINE}
    passes = Passes(
      objective, params, state.extra, batch, rng, accum, frozen, teachers
    )
    if combine is not None:
      _check_tasks(combine, state, len(passes.counts))
    out, grads = _gradients(passes, state, combine, rng)
    grads = fill(grads, jax.tree.map(jnp.zeros_like, state.params))
    metrics = _named(out.loss, out.taken.losses, out.taken.metrics)
    metrics |= out.metrics
    norms = jax.tree.map(lambda g: jnp.sum(jnp.square(g)), grads)
    finite = jnp.stack([jnp.isfinite(n) for n in jax.tree.leaves(norms)])
    ok = jnp.all(finite) & jnp.isfinite(metrics['loss'])

    def apply(state: TrainState) -> TrainState:
      updates, opt_state = tx.update(grads, state.opt_state, state.params)
      params = optax.apply_updates(state.params, updates)
      averages = {
        ema_key(d): jax.tree.map(
          lambda a, p, d=d: d * a + (1.0 - d) * p, state.ema[ema_key(d)], params
        )
        for d in ema
      }
      return state.replace(
        params=params,
        opt_state=opt_state,
        ema=averages,
        extra=objective.after_update(
          out.taken.extra, params, state.step, metrics
        ),
        combine=out.state,
      )

    # A branch and not a selection: on CPU selecting each leaf costs three times
    # what AdamW itself does.
    if skip_nonfinite:
      new = jax.lax.cond(ok, apply, lambda state: state, state)
    else:
      new = apply(state)
    new = new.replace(step=state.step + 1)
    metrics |= {
      'grad_norm': jnp.sqrt(sum(jax.tree.leaves(norms))),
      'skipped': 1.0 - ok.astype(jnp.float32),
      'finite': finite,
    }
    return new, metrics

  return step


def make_eval_step(
  objective: base.Objective,
) -> Callable[[PyTree, PyTree, base.Batch, jax.Array], base.LossOut]:
  """Return the pure function (params, extra, batch, rng) -> LossOut."""

  def step(params, extra, batch, rng):
    return objective.loss(params, extra, batch, rng, train=False)

  return step


def _stream(key: jax.Array, name: str) -> jax.Array:
  """Return an independent key for one purpose, by a name that never moves."""
  return jax.random.fold_in(key, {'init': 0, 'train': 1}[name])


def _gradients(
  passes: Passes, state: TrainState, combine: Combiner | None, rng: jax.Array
) -> tuple[Combined, PyTree]:
  """Return what comes of the tasks, and the gradients of all parameters."""
  if combine is None:
    taken = passes.weighted(jnp.ones_like(passes.counts))
    loss = jnp.sum(taken.losses) + taken.aux
    return Combined(loss, taken, {}, {}, {}), taken.grads
  out = combine(
    passes,
    state.params.get(COMBINE, {}),
    state.combine,
    state.step,
    jax.random.fold_in(rng, _COMBINE_ROW),
  )
  if not out.learned:
    return out, out.taken.grads
  return out, {**out.taken.grads, COMBINE: out.learned}


def _init(objective, seed, batch, combine) -> tuple[PyTree, PyTree, PyTree]:
  """Return (params, extra, state of the combiner)."""
  rng = _stream(jax.random.key(seed), 'init')
  params, extra = objective.init(rng, batch)
  if combine is None:
    return params, extra, {}
  if COMBINE in params:
    raise ValueError(
      f'config.combine: its parameters are {COMBINE!r}, a name that the '
      f'objective has among {sorted(params)}'
    )
  out = jax.eval_shape(
    functools.partial(objective.loss, train=False),
    {**params, **teacher_spec(objective)},
    extra,
    batch,
    rng,
  )
  learned, combined = combine.init(out.sums.shape[0])
  return {**params, COMBINE: learned} if learned else params, extra, combined


def _check_tasks(combine: Combiner, state: TrainState, tasks: int) -> None:
  """Refuse a number of tasks that the combiner's state is not made for."""
  made = jax.eval_shape(lambda: combine.init(tasks))
  found = state.params.get(COMBINE, {}), state.combine
  shapes = [[x.shape for x in jax.tree.leaves(t)] for t in (made, found)]
  if shapes[0] != shapes[1]:
    raise ValueError(
      f'config.combine is set up for {shapes[1]}, by the tasks of an '
      f'evaluation, and a training step has {tasks} tasks, {shapes[0]}: '
      'expected as many in both; config.objective.experts have one each, '
      'without `tasks` of their own'
    )


def _named(loss, losses, metrics) -> Metrics:
  """Collect the scalars of a step; task losses appear from two tasks on."""
  out = {'loss': loss, **metrics}
  if losses.shape[0] > 1:
    out |= {f'loss_task{k}': losses[k] for k in range(losses.shape[0])}
  return out
