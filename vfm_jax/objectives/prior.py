"""Draw the experts of Switch-DiT towards a sliding window of noise levels.

Park et al. 2024 (arXiv:2403.09176), section 4.3, as released: a table like
that of DTR says which of all experts of the network a level should use, each
expert is matched with a column of it, and the gates are compared with the row
of their level by the Jensen-Shannon divergence.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vfm_jax.models import switch
from vfm_jax.ops import assignment, routing

_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class DiffusionPrior:
  """Score the gates of `models.switch`; an `Auxiliary` of `Denoise`.

  Columns are the experts of all layers, P = L E, layer by layer. The matching
  is computed on what all noise levels use, from the parameters alone, and has
  no gradient; that of the divergence goes to the gates of the batch.

  Attributes:
    weight: of the loss; the released default.
    alpha: of the window, see `ops.routing.starts`.
    impl: how the matching is found, see `ops.assignment.assign`.
    shuffle: order of the columns, on which the choice among equally good
      matchings depends. None keeps them as they are; a seed draws other ones
      for each batch, by its noise levels, as the released code does.
  """

  weight: float = 1.0
  alpha: float = 4.0
  impl: assignment.Impl = 'auto'
  shuffle: int | None = None

  def __call__(
    self,
    values: Mapping[str, jax.Array],
    tau: jax.Array,
    valid: jax.Array,
    orders: tuple[jax.Array, jax.Array] | None = None,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the weighted loss f32 [] and its metrics.

    These are `prior_jsd`, the divergence in nats, at most ln 2, and
    `prior_agreement`, the share of (level, expert) pairs that are used as the
    prior says.

    Args:
      values: what `models.switch` sows.
      tau: int32 [B] noise levels.
      valid: f32 [B], 0 for examples that do not count.
      orders: as in `match`, in place of those that `shuffle` draws.
    """
    prior, cost = self._compared(values)
    match = self._matched(cost, tau, orders)
    return self._scored(values, tau, valid, prior, cost, match)

  def _compared(self, values):
    """Return the prior [T, P], and in what its columns differ [P, P]."""
    layers, _, experts = values[switch.GATES].shape
    used = used_columns(values[switch.TOP], experts)
    active = values[switch.TOP].shape[-1] * layers
    prior = prior_columns(layers * experts, active, alpha=self.alpha)
    return prior, matching_cost(used, prior)

  def _matched(self, cost, tau, orders):
    if orders is None and self.shuffle is not None:
      orders = _orders(self.shuffle, tau, len(cost))
    return self.match(cost, orders)

  def _scored(self, values, tau, valid, prior, cost, match):
    """Return loss and metrics by a matching."""
    layers, _, top_k = values[switch.TOP].shape
    p = columns(values[switch.GATES]) / layers
    q = prior[:, match][tau] / (layers * top_k)
    count = jnp.maximum(valid.sum(), 1.0)
    loss = (divergence(p, q) * valid).sum() / count
    wrong = jnp.take_along_axis(cost, match[:, None], 1).sum()
    metrics = {
      'prior_jsd': loss,
      'prior_agreement': 1 - wrong / prior.size,
    }
    return self.weight * loss, metrics

  def match(
    self,
    cost: jax.Array,
    orders: tuple[jax.Array, jax.Array] | None = None,
  ) -> jax.Array:
    """Return the column int32 [P] of the prior for each column of the gates.

    Args:
      cost: int32 [P, P], see `matching_cost`.
      orders: permutations int32 [P] of the columns of gates and prior, to
        find the matching in.
    """
    if orders is None:
      return assignment.assign(cost, impl=self.impl)
    gates, prior = orders
    found = assignment.assign(cost[gates][:, prior], impl=self.impl)
    return jnp.zeros_like(found).at[gates].set(prior[found])


class Held(NamedTuple):
  """Hold a matching.

  Attributes:
    match: int32 [P], as `DiffusionPrior.match` returns it.
    age: int32 [], steps since it was made.
  """

  match: jax.Array
  age: jax.Array


@dataclasses.dataclass(frozen=True)
class HeldPrior(DiffusionPrior):
  """Match anew only every few steps; `objectives.base.Holds`.

  That keeps the matching, a long chain of small operations, out of nearly all
  steps. Between two of them the prior of each expert stays, while the gates
  move on. It is ours: the released code matches in each step.

  Attributes:
    every: steps from one matching to the next.
  """

  every: int = 25

  def __post_init__(self):
    if self.every < 1:
      raise ValueError(
        f'expected `objective.auxiliary.every` of 1 or more, found {self.every}'
      )

  def init(self, values: Mapping[str, jax.Array]) -> Held:
    """Return a state that the first step replaces."""
    layers, _, experts = values[switch.GATES].shape
    match = jnp.arange(layers * experts, dtype=jnp.int32)
    return Held(match, jnp.zeros((), jnp.int32))

  def refresh(
    self, state: Held, values: Mapping[str, jax.Array], tau: jax.Array
  ) -> Held:
    """Return the state with a new matching where the last one is too old."""
    _, cost = self._compared(values)
    match = jax.lax.cond(
      state.age == 0,
      lambda: self._matched(cost, tau, None),
      lambda: state.match,
    )
    return state._replace(match=match)

  def after_update(self, state: Held) -> Held:
    """Return the state a step older."""
    return state._replace(age=(state.age + 1) % self.every)

  def __call__(
    self,
    values: Mapping[str, jax.Array],
    tau: jax.Array,
    valid: jax.Array,
    orders: tuple[jax.Array, jax.Array] | None = None,
    state: Held | None = None,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return what `DiffusionPrior` does, by the matching of a state if any."""
    if state is None:
      return super().__call__(values, tau, valid, orders)
    prior, cost = self._compared(values)
    return self._scored(values, tau, valid, prior, cost, state.match)


def columns(values: jax.Array) -> jax.Array:
  """Return values [L, T, E] as columns [T, L E], layer by layer."""
  return jnp.moveaxis(values, 0, 1).reshape(values.shape[1], -1)


def used_columns(top: jax.Array, experts: int) -> jax.Array:
  """Return 1 where a level uses an expert, int32 [T, L E], of top [L, T, k]."""
  used = jax.nn.one_hot(top.astype(jnp.int32), experts, dtype=jnp.int32)
  return columns(used.sum(-2))


def prior_columns(count: int, active: int, *, alpha: float = 4.0) -> jax.Array:
  """Return the prior int32 [NOISE_LEVELS, count]: `active` ones a level.

  L k of L E columns, exactly: the product with k / E, which the released code
  rounds down, is one less in rare cases (from 10 experts on).
  """
  table = routing.sliding_window(count, active, alpha=alpha)
  return jnp.asarray(table, jnp.int32)


def matching_cost(used: jax.Array, prior: jax.Array) -> jax.Array:
  """Return in how many levels each pair of columns differs, int32 [P, P].

  Args:
    used: int32 [T, P], 0 or 1, of the gates: the rows of the result.
    prior: int32 [T, P], 0 or 1.
  """
  # Counts of at most T are exact in float32, and 0 and 1 in any type.
  both = jnp.einsum(
    'ti,tj->ij', used.astype(jnp.float32), prior.astype(jnp.float32)
  )
  both = jnp.round(both).astype(jnp.int32)
  return used.sum(0)[:, None] + prior.sum(0) - 2 * both


def divergence(p: jax.Array, q: jax.Array) -> jax.Array:
  """Return the Jensen-Shannon divergence [B] of rows [B, P], in nats.

  1e-6 is added inside the logarithms.
  """
  log = lambda x: jnp.log(x + _EPS)  # noqa: E731
  middle = log((p + q) / 2)
  each = p * (log(p) - middle) + q * (log(q) - middle)
  return 0.5 * each.sum(-1)


def _orders(seed, tau, size):
  """Return permutations that depend on the seed and the levels of a batch."""
  number = (tau * (1 + jnp.arange(len(tau)))).sum()
  key = jax.random.fold_in(jax.random.key(seed), number)
  first, second = jax.random.split(key)
  permute = jax.random.permutation
  return permute(first, size), permute(second, size)
