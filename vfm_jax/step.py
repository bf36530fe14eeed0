"""Define the training state and the two pure step functions.

Everything a run is, is in `TrainState`; everything a step does, is a pure
function of it and a batch. The functions know an objective only through its
protocol.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from vfm_jax.objectives import base

PyTree = Any
Metrics = dict[str, Any]


class TrainState(flax.struct.PyTreeNode):
  """Hold all that a run needs to go on, bit for bit.

  Attributes:
    step: i32 [] number of finished steps.
    params: trainable and frozen parameters of the objective, float32.
    opt_state: state of the optax transformation.
    ema: exponential moving averages of `params`, keyed by their decay.
    extra: non-gradient state of the objective (teachers, queues, stages).
    rng: u32 [2] key data; the key of a step is `fold_in(rng, step)`.
  """

  step: jax.Array
  params: PyTree
  opt_state: PyTree
  ema: dict[str, PyTree]
  extra: PyTree
  rng: jax.Array


StepFn = Callable[[TrainState, base.Batch], tuple[TrainState, Metrics]]


def ema_key(decay: float) -> str:
  """Return the name of an average in `TrainState.ema`."""
  return f'{decay:g}'


def init_params(
  objective: base.Objective, seed: jax.Array | int, batch: base.Batch
) -> tuple[PyTree, PyTree]:
  """Return the objective's (params, extra) for a seed; jit or eval_shape."""
  return objective.init(_stream(jax.random.key(seed), 'init'), batch)


def init_state(
  objective: base.Objective,
  tx: optax.GradientTransformation,
  seed: jax.Array | int,
  batch: base.Batch,
  *,
  ema: Sequence[float] = (),
) -> TrainState:
  """Build the state of step 0; call under `jax.jit` or `jax.eval_shape`.

  Args:
    objective: what is trained.
    tx: optimizer.
    seed: of the parameters and of all randomness of the run.
    batch: arrays or shape structs of one batch, for their shapes only.
    ema: decays of the averages to keep, each in (0, 1).
  """
  params, extra = init_params(objective, seed, batch)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=tx.init(params),
    # Copies: a donated state must not hold one buffer twice.
    ema={ema_key(d): jax.tree.map(jnp.copy, params) for d in ema},
    extra=extra,
    rng=jax.random.key_data(_stream(jax.random.key(seed), 'train')),
  )


def make_train_step(
  objective: base.Objective,
  tx: optax.GradientTransformation,
  *,
  accum: int = 1,
  ema: Sequence[float] = (),
  skip_nonfinite: bool = True,
) -> StepFn:
  """Return the pure function (state, batch) -> (state, metrics).

  Gradient accumulation is exact: the loss is sum_k sums_k / counts_k + aux
  with sums and counts added over the microbatches first.

  Args:
    objective: what is trained.
    tx: optimizer.
    accum: number of microbatches that one batch is cut into.
    ema: decays, as given to `init_state`.
    skip_nonfinite: leave the state as it is when the loss or a gradient is
      not finite; `metrics['finite']` says for each parameter leaf (bool, in
      the order of `jax.tree.leaves(params)`) whether its gradient was.
  """

  def step(state: TrainState, batch: base.Batch):
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    grads, metrics, extra = _gradients(objective, state, batch, rng, accum)
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
        extra=objective.after_update(extra, params, state.step, metrics),
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
  objective: base.Objective,
  state: TrainState,
  batch: base.Batch,
  rng: jax.Array,
  accum: int,
) -> tuple[PyTree, Metrics, PyTree]:
  """Return (gradients, metrics, new extra) of the whole batch."""

  def out_of(params, extra, micro):
    return objective.loss(params, extra, micro, rng, train=True)

  def loss_fn(params, extra, micro, counts, parts):
    out = out_of(params, extra, micro)
    losses = out.sums / jnp.maximum(counts, 1.0)
    return jnp.sum(losses) + out.aux / parts, (losses, out)

  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  if accum == 1:
    counts = _counts(out_of, state, batch)
    (loss, (losses, out)), grads = grad_fn(
      state.params, state.extra, batch, counts, 1
    )
    return grads, _named(loss, losses, out.metrics), out.extra

  micros = jax.tree.map(lambda x: _split(x, accum), batch)
  # Counts do not depend on the parameters, so the compiler drops the rest of
  # this pass; it makes the weight of each microbatch known before gradients.
  counts = jnp.sum(
    jax.lax.map(lambda micro: _counts(out_of, state, micro), micros), axis=0
  )

  def body(carry, micro):
    grads, extra = carry
    (loss, (losses, out)), g = grad_fn(
      state.params, extra, micro, counts, accum
    )
    return (jax.tree.map(jnp.add, grads, g), out.extra), (
      loss,
      losses,
      out.metrics,
    )

  zeros = jax.tree.map(jnp.zeros_like, state.params)
  (grads, extra), (loss, losses, named) = jax.lax.scan(
    body, (zeros, state.extra), micros
  )
  means = jax.tree.map(lambda m: jnp.mean(m, axis=0), dict(named))
  return grads, _named(loss.sum(), losses.sum(axis=0), means), extra


def _counts(out_of, state: TrainState, batch: base.Batch) -> jax.Array:
  return jax.lax.stop_gradient(out_of(state.params, state.extra, batch).counts)


def _split(x: jax.Array, accum: int) -> jax.Array:
  """Cut [B, ...] into [accum, B / accum, ...], strided: no device moves."""
  if x.shape[0] % accum:
    raise ValueError(
      f'a batch of {x.shape[0]} does not divide into accum={accum} parts; '
      'change config.batch_size or config.accum'
    )
  return jnp.swapaxes(x.reshape(x.shape[0] // accum, accum, *x.shape[1:]), 0, 1)


def _named(loss, losses, metrics) -> Metrics:
  """Collect the scalars of a step; task losses appear from two tasks on."""
  out = {'loss': loss, **metrics}
  if losses.shape[0] > 1:
    out |= {f'loss_task{k}': losses[k] for k in range(losses.shape[0])}
  return out
