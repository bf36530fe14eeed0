"""Match tubes with people and weigh what is wrong, as DETR does.

RECONSTRUCTED like `models.star`: Hungarian matching on the key frame, which is
the one that AVA annotates, then L1 (weight 5) and generalised IoU (2) of the
boxes, focal loss of there being a person and cross entropy of each action. The
weights of the last two and the cost of the matching are ours.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vfm_jax.evals.base import Held
from vfm_jax.models.star import StarDecoder, Tubes
from vfm_jax.objectives.base import PyTree
from vfm_jax.ops import boxes as boxes_lib
from vfm_jax.ops.assignment import assign
from vfm_jax.ops.focal import sigmoid_focal
from vfm_jax.ops.tokens import Grid

# Costs are at most 25; the assignment wants integers up to about 10^6.
_STEPS = 20_000


class Targets(NamedTuple):
  """Hold the people of key frames, G at most.

  Attributes:
    boxes: f32 [B, G, 4] centre x, y, width and height, from 0 to 1.
    actions: f32 [B, G, C], 1 for what the person does.
    present: bool [B, G], False for padding.
  """

  boxes: Any
  actions: Any
  present: Any


@dataclasses.dataclass(frozen=True)
class Weights:
  """Weigh the parts of the loss."""

  l1: float = 5.0
  giou: float = 2.0
  person: float = 1.0
  action: float = 1.0


@dataclasses.dataclass(frozen=True)
class Plan:
  """Hold what is fixed while a decoder learns."""

  objective: Any
  decoder: StarDecoder
  grid: Grid
  weights: Weights
  optimizer: Any


def key_frame(tubes: Tubes) -> Tubes:
  """Return the tubes in the middle frame: [B, S], [B, S, C], [B, S, 4]."""
  middle = tubes.person.shape[1] // 2
  return Tubes(*(x[:, middle] for x in tubes))


def match(found: Tubes, targets: Targets, weights: Weights) -> jax.Array:
  """Return the person int32 [B, S] of each query; G or more for none.

  The cost of a pair is that of the boxes in the loss, less the probability of
  a person times the mean one of what it does.

  Args:
    found: of the key frame.
    targets: the people; G is at most S.
    weights: of the loss.
  """
  size, people = found.person.shape[1], targets.present.shape[1]
  a, b = found.boxes[:, :, None], targets.boxes[:, None]
  giou = boxes_lib.generalised_iou(boxes_lib.corners(a), boxes_lib.corners(b))
  right = jnp.einsum(
    'bsc,bgc->bsg', jax.nn.sigmoid(found.actions), targets.actions
  ) / jnp.maximum(targets.actions.sum(-1)[:, None], 1.0)
  right = right * jax.nn.sigmoid(found.person)[..., None]
  cost = weights.l1 * jnp.abs(a - b).sum(-1)
  cost = cost + weights.giou * (1.0 - giou) + weights.action * (1.0 - right)
  # Whom nobody is there to match costs nothing.
  cost = jnp.where(targets.present[:, None], cost, 0.0)
  cost = jnp.pad(cost, ((0, 0), (0, 0), (0, size - people)))
  top = 4 * weights.l1 + 4 * weights.giou + weights.action
  cost = jnp.round(cost * (25.0 / top * _STEPS)).astype(jnp.int32)
  # Of GPUs too: a callback under `vmap` would run one after another.
  return jax.vmap(functools.partial(assign, impl='device'))(cost)


def loss(
  found: Tubes, targets: Targets, weights: Weights
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Return the loss f32 [] and its parts, each over the number of people.

  Args:
    found: of the key frame.
    targets: the people.
    weights: of the parts.
  """
  people = targets.present.shape[1]
  index = match(jax.lax.stop_gradient(found), targets, weights)
  at = jnp.minimum(index, people - 1)
  boxes, actions, present = (
    jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * (x.ndim - 2)), axis=1)
    for x in targets
  )
  taken = (index < people) & present
  count = jnp.maximum(targets.present.sum(), 1)
  a, b = (boxes_lib.corners(x) for x in (found.boxes, boxes))
  own = optax.sigmoid_binary_cross_entropy(found.actions, actions).sum(-1)
  each = {
    'l1': taken * jnp.abs(found.boxes - boxes).sum(-1),
    'giou': taken * (1.0 - boxes_lib.generalised_iou(a, b)),
    'person': sigmoid_focal(found.person, taken),
    'action': taken * own,
  }
  parts = {name: x.sum() / count for name, x in each.items()}
  total = sum(getattr(weights, name) * x for name, x in parts.items())
  return jnp.asarray(total), parts


def init(
  objective: Any,
  decoder: StarDecoder,
  grid: Grid,
  params: PyTree,
  batch,
  key: jax.Array,
) -> PyTree:
  """Return parameters of a decoder for the tokens of an objective."""
  tokens = jax.eval_shape(objective.tokens, params, batch)
  one = jax.ShapeDtypeStruct((1, *tokens.shape[1:]), tokens.dtype)
  call = lambda module, x: module(x, grid)  # noqa: E731
  return decoder.lazy_init(key, one, method=call)['params']


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def train_step(held: Held, params: PyTree, state, batch, targets, key, n):
  """Return the next (decoder, optimizer) state and the loss before it.

  Args:
    held: `Held` plan.
    params: of the frozen objective.
    state: parameters of the decoder and state of the optimizer.
    batch: of the pipeline.
    targets: `Targets` of its key frames.
    key: of the dropout.
    n: number of the step.
  """
  plan = held.objective
  tokens = jax.lax.stop_gradient(plan.objective.tokens(params, batch))
  rngs = {'dropout': jax.random.fold_in(key, n)}

  def loss_of(decoder):
    tubes = plan.decoder.apply(
      {'params': decoder}, tokens, plan.grid, train=True, rngs=rngs
    )
    return loss(key_frame(tubes), targets, plan.weights)[0]

  decoder, opt = state
  value, grads = jax.value_and_grad(loss_of)(decoder)
  updates, opt = plan.optimizer.update(grads, opt, decoder)
  return (optax.apply_updates(decoder, updates), opt), value


@functools.partial(jax.jit, static_argnums=0)
def detect(held: Held, params: PyTree, decoder: PyTree, batch):
  """Return corners [B, S, 4] and scores [B, S, C] of the key frames.

  The score of an action is the probability of a person times its own.
  """
  plan = held.objective
  tokens = plan.objective.tokens(params, batch)
  found = key_frame(plan.decoder.apply({'params': decoder}, tokens, plan.grid))
  scores = jax.nn.sigmoid(found.person)[..., None]
  scores = scores * jax.nn.sigmoid(found.actions)
  return jnp.clip(boxes_lib.corners(found.boxes), 0.0, 1.0), scores
