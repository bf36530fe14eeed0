"""Take one step with a grid of heads on frozen features."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from vfm_jax import optim, schedules, trees
from vfm_jax.evals.base import Held
from vfm_jax.objectives.base import PyTree

# What a head reads: the embedding [B, D], or all tokens [B, n, D].
Reads = Literal['embed', 'tokens']


@dataclasses.dataclass(frozen=True)
class Plan:
  """Hold what is fixed while the heads of all labels learn."""

  heads: tuple[tuple[str, nn.Module], ...]
  method: Callable
  clip_norm: float | None
  where: Any

  def optimizer(self, params: PyTree, wd: Any) -> optax.GradientTransformation:
    """Return the transformation for one copy; `wd` may be traced."""
    _, rows = optim.Optimizer(lr=schedules.constant, weight_decay=1.0).build(
      params, 1
    )
    table = {row.path: row for row in rows}

    def decay(updates, params):
      return trees.map_with_path(
        lambda path, u, p: u + wd * table[path].weight_decay * p,
        updates,
        params,
      )

    tx = self.method(optax.stateless(decay), table)
    if self.clip_norm is None:
      return tx
    return optax.chain(optax.clip_by_global_norm(self.clip_norm), tx)

  def pin(self, tree: PyTree) -> PyTree:
    """Keep arrays whole on every device of the mesh, if there is one."""
    if self.where is None:
      return tree
    return jax.lax.with_sharding_constraint(tree, self.where)


@functools.partial(jax.jit, static_argnums=(0, 1))
def first_state(plan: Plan, copies: int, seed, x):
  """Return the first (parameters, optimizer states), by label."""
  heads, states = {}, {}
  for i, (label, head) in enumerate(plan.heads):
    key = jax.random.fold_in(jax.random.key(seed), i)
    one = head.init(key, x[:1])['params']
    heads[label] = jax.tree.map(
      lambda p: jnp.broadcast_to(p, (copies, *p.shape)), one
    )
    # The decay has no state, so that of any copy serves.
    states[label] = jax.vmap(plan.optimizer(one, 0.0).init)(heads[label])
  return plan.pin((heads, states))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def step(plan: Plan, state, x, y, lrs, wds):
  """Return the next state, and the losses f32 [G] by label."""
  heads, states = ({**part} for part in state)
  losses = {}
  for label, head in plan.heads:

    def loss_of(params, head=head, label=label):
      logits = _apply(head, params, x)
      return optax.softmax_cross_entropy_with_integer_labels(
        logits, y[label]
      ).mean()

    def one(params, state, lr, wd, loss_of=loss_of):
      loss, grads = jax.value_and_grad(loss_of)(params)
      tx = plan.optimizer(params, wd)
      updates, state = tx.update(grads, state, params)
      params = jax.tree.map(lambda p, u: p - lr * u, params, updates)
      return params, state, loss

    heads[label], states[label], losses[label] = jax.vmap(one)(
      heads[label], states[label], lrs, wds
    )
  return plan.pin(((heads, states), losses))


@functools.partial(jax.jit, static_argnums=0)
def probabilities(plan: Plan, heads, x):
  """Return f32 [G, B, C] by label."""
  out = {}
  for label, head in plan.heads:
    logits = jax.vmap(functools.partial(_apply, head, x=x))(heads[label])
    out[label] = jax.nn.softmax(logits)
  return plan.pin(out)


@functools.partial(jax.jit, static_argnums=(0, 1))
def encode(held: Held, reads: Reads, params, batch):
  """Return f32 [B, D] or [B, n, D] of a batch, without a gradient."""
  return getattr(held.objective, reads)(params, batch).astype(jnp.float32)


def _apply(head: nn.Module, params: PyTree, x: jax.Array) -> jax.Array:
  logits: Any = head.apply({'params': params}, x)
  return logits.astype(jnp.float32)
