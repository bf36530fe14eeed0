"""Take the gradients of an objective's tasks, exact over microbatches.

The loss of task k is L_k = sums_k / counts_k, both added over the microbatches
first. What is taken of it is up to the caller: one backward pass for a weighted
sum of the losses, or a gradient for each.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from vfm_jax import trees
from vfm_jax.objectives import base

PyTree = Any


class Taken(flax.struct.PyTreeNode):
  """Hold what a pass over the batch gave.

  Attributes:
    losses: f32 [K], the mean loss of each task; 0 for one without examples.
    aux: f32 [], the auxiliary loss.
    grads: gradient, of the shape of the parameters, None for frozen ones.
    metrics: of the objective, averaged over the microbatches.
    extra: the objective's new state.
  """

  losses: jax.Array
  aux: jax.Array
  grads: PyTree
  metrics: dict[str, jax.Array]
  extra: PyTree


class Passes:
  """Offer passes over one batch; each that is asked for is computed.

  Attributes:
    counts: f32 [K], elements of each task in the whole batch.
    present: bool [K], whether a task has any.
    num_present: f32 [], how many tasks have, at least 1.
  """

  def __init__(
    self,
    objective: base.Objective,
    params: PyTree,
    extra: PyTree,
    batch: base.Batch,
    rng: jax.Array,
    accum: int = 1,
    frozen: Collection[str] = (),
    beside: Mapping[str, PyTree] | None = None,
  ):
    """Count the elements of each task; nothing is differentiated yet.

    Args:
      objective: what is trained.
      params: its parameters.
      extra: its state before the batch.
      batch: the whole batch.
      rng: key of the step.
      accum: number of microbatches that the batch is cut into.
      frozen: paths of parameters whose gradients nobody wants, which are then
        not computed.
      beside: trees that the objective finds beside the parameters, without
        gradients.

    Raises:
      ValueError: the batch does not divide into them.
    """
    held = _only(params, lambda path: path in frozen)
    self._params = _only(params, lambda path: path not in frozen)
    self._extra, self._accum = extra, accum
    if accum > 1:
      batch = jax.tree.map(lambda x: _split(x, accum), batch)
    self._batch = batch
    self._loss = lambda params, extra, micro: objective.loss(
      {**fill(params, held), **(beside or {})}, extra, micro, rng, train=True
    )
    # Counts do not depend on the parameters, so the compiler drops the rest of
    # this pass; it makes the weight of each microbatch known before gradients.
    self.counts = jax.lax.stop_gradient(self._count())
    self.present = self.counts > 0
    self.num_present = jnp.maximum(self.present.sum(), 1).astype(jnp.float32)

  def weighted(self, weights: jax.Array) -> Taken:
    """Return the gradient of sum_k weights_k L_k + aux, in one backward pass.

    Args:
      weights: f32 [K]; no gradient is taken with respect to them.
    """

    def loss(params, extra, micro):
      losses, out = self._losses(params, extra, micro)
      return jnp.sum(weights * losses) + out.aux / self._accum, (losses, out)

    def take(grads, extra, micro):
      new, outs = jax.grad(loss, has_aux=True)(self._params, extra, micro)
      return jax.tree.map(jnp.add, grads, new), outs

    return self._run(take, self._zeros())

  def separate(self) -> tuple[Taken, PyTree]:
    """Return the gradient of aux, and those of all tasks [K, ...] each.

    The forward pass is shared by the K backward passes, which are one compiled
    loop; that of aux is repeated, and both its passes vanish where aux does not
    depend on the parameters. Takes K times the memory of the parameters.
    """
    tasks = len(self.counts)
    rows = jnp.eye(tasks)

    def take(grads, extra, micro):
      losses, pull, out = jax.vjp(
        lambda params: self._losses(params, extra, micro),
        self._params,
        has_aux=True,
      )

      def add(sums, k):
        new = pull(rows[k])[0]
        return jax.tree.map(lambda s, g: s.at[k].add(g), sums, new), None

      each, _ = jax.lax.scan(add, grads['each'], jnp.arange(tasks))
      aux = jax.grad(
        lambda params: self._loss(params, extra, micro).aux / self._accum
      )(self._params)
      aux = jax.tree.map(jnp.add, grads['aux'], aux)
      return {'aux': aux, 'each': each}, (losses, out)

    stacked = jax.tree.map(
      lambda p: jnp.zeros((tasks, *p.shape), p.dtype), self._params
    )
    taken = self._run(take, {'aux': self._zeros(), 'each': stacked})
    return taken.replace(grads=taken.grads['aux']), taken.grads['each']

  def _zeros(self) -> PyTree:
    return jax.tree.map(jnp.zeros_like, self._params)

  def _losses(self, params, extra, micro) -> tuple[jax.Array, base.LossOut]:
    """Return what a microbatch adds to the losses [K], and all else."""
    out = self._loss(params, extra, micro)
    return out.sums / jnp.maximum(self.counts, 1.0), out

  def _count(self) -> jax.Array:
    def count(extra, micro):
      out = self._loss(self._params, extra, micro)
      return out.extra, out.counts

    if self._accum == 1:
      return count(self._extra, self._batch)[1]
    # The state goes along, for the tasks of a microbatch may depend on it.
    return jax.lax.scan(count, self._extra, self._batch)[1].sum(axis=0)

  def _run(self, take: Callable[..., Any], zeros: PyTree) -> Taken:
    """Add take(grads, extra, microbatch) up over the microbatches."""

    def body(carry, micro):
      grads, (losses, out) = take(*carry, micro)
      return (grads, out.extra), (losses, out.aux, dict(out.metrics))

    start = (zeros, self._extra)
    if self._accum == 1:
      (grads, extra), (losses, aux, metrics) = body(start, self._batch)
      return Taken(losses, aux, grads, metrics, extra)
    (grads, extra), (losses, aux, metrics) = jax.lax.scan(
      body, start, self._batch
    )
    metrics = jax.tree.map(lambda m: jnp.mean(m, axis=0), metrics)
    return Taken(losses.sum(axis=0), aux.mean(), grads, metrics, extra)


def fill(part: PyTree, rest: PyTree) -> PyTree:
  """Return `part` with the leaves of `rest` where it has None."""
  return jax.tree.map(
    lambda x, y: y if x is None else x, part, rest, is_leaf=lambda x: x is None
  )


def _only(params: PyTree, wanted: Callable[[str], bool]) -> PyTree:
  """Return the parameters with None in place of those not wanted."""
  return trees.map_with_path(
    lambda path, x: x if wanted(path) else None, params
  )


def _split(x: jax.Array, accum: int) -> jax.Array:
  """Cut [B, ...] into [accum, B / accum, ...], strided: no device moves."""
  if x.shape[0] % accum:
    raise ValueError(
      f'a batch of {x.shape[0]} does not divide into accum={accum} parts; '
      'change config.batch_size or config.accum'
    )
  return jnp.swapaxes(x.reshape(x.shape[0] // accum, accum, *x.shape[1:]), 0, 1)
