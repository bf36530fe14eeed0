"""Build the optimizer of a run: an optax chain with groups by parameter path.

The update of a trainable parameter is

  p <- p - lr(step) * scale(p) * method(gradient, decay(p))

where scale(p) is the product of its group's `lr_scale` and its layer's decay.
A frozen parameter has no optimizer state and never moves.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vfm_jax import trees

PyTree = Any

_NO_DECAY = re.compile(r'(^|_)(bias|scale|gamma|tokens?|pos_embed)$')
_EMBEDDING = re.compile(r'(^|/)(patch_embed|pos_embed|[a-z_]*token)(/|$)')


@dataclasses.dataclass(frozen=True)
class Group:
  """Treat the parameters whose path matches in their own way.

  Attributes:
    pattern: regular expression, searched in the '/'-joined path.
    lr_scale: factor on the learning rate.
    weight_decay: coefficient in place of the optimizer's, also for parameters
      that would have none; None keeps the optimizer's.
    freeze: never move these parameters.
  """

  pattern: str
  lr_scale: float = 1.0
  weight_decay: float | None = None
  freeze: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
  """Say how one parameter is treated.

  Attributes:
    path: its '/'-joined path.
    shape: its shape.
    group: pattern of the group that it fell in, '' for none.
    lr_scale: factor on the learning rate; one a layer for a scanned stack.
    weight_decay: coefficient; at step 0 if `scheduled`.
    scheduled: the coefficient follows the optimizer's weight decay schedule.
    stacked: its first axis is the depth of a scanned stack.
    frozen: it never moves.
  """

  path: str
  shape: tuple[int, ...]
  group: str
  lr_scale: float | tuple[float, ...]
  weight_decay: float
  scheduled: bool
  stacked: bool
  frozen: bool


Rows = Mapping[str, Row]
Method = Callable[
  [optax.GradientTransformation, Rows], optax.GradientTransformation
]


def decay_matrices(path: str, ndim: int) -> bool:
  """Say whether a parameter decays: not 1-D ones, biases, scales, tokens.

  Args:
    path: of the parameter.
    ndim: its axes without the depth axis of a scanned stack.
  """
  return ndim > 1 and not _NO_DECAY.search(path.split('/')[-1])


def decay_tokens(path: str, ndim: int) -> bool:
  """Say whether a parameter decays: as `decay_matrices`, and mask tokens do.

  The official V-JEPA code leaves out biases and what has one axis, and its mask
  tokens have three.
  """
  return decay_matrices(path, ndim) or path.endswith('mask_tokens')


def adam(
  decay: optax.GradientTransformation,
  rows: Rows,
  *,
  b1: float = 0.9,
  b2: float = 0.95,
  eps: float = 1e-8,
  mu_dtype: str | None = None,
) -> optax.GradientTransformation:
  """Adam with decoupled weight decay (AdamW, arXiv:1711.05101).

  `mu_dtype='bfloat16'` halves the memory of the first moment.
  """
  del rows
  return optax.chain(optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype), decay)


def sgd(
  decay: optax.GradientTransformation,
  rows: Rows,
  *,
  momentum: float = 0.9,
  nesterov: bool = False,
) -> optax.GradientTransformation:
  """Gradient descent with momentum; the decay is part of the gradient."""
  del rows
  return optax.chain(decay, optax.trace(momentum, nesterov))


def lars(
  decay: optax.GradientTransformation,
  rows: Rows,
  *,
  momentum: float = 0.9,
  trust: float = 0.001,
) -> optax.GradientTransformation:
  """LARS (arXiv:1708.03888), as MAE's linear probes use it.

  The trust ratio is taken for each matrix, in a scanned stack for each layer;
  1-D parameters, biases and tokens go without.
  """
  ratio = optax.scale_by_trust_ratio(trust_coefficient=trust)

  def scale(path: str, u: jax.Array, p: jax.Array) -> jax.Array:
    row = rows[path]
    if not decay_matrices(path, len(row.shape) - row.stacked):
      return u

    def one(u: jax.Array, p: jax.Array) -> Any:
      return ratio.update(u, optax.EmptyState(), p)[0]

    return (jax.vmap(one) if row.stacked else one)(u, p)

  return optax.chain(
    decay, _stateless(scale, needs_params=True), optax.trace(momentum)
  )


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """Describe the optimizer of a run.

  Attributes:
    lr: schedule (step, total_steps) -> learning rate.
    weight_decay: coefficient, or a schedule of it.
    method: `adam`, `sgd`, `lars` or a bind of one; (decay, rows) -> optax.
    clip_norm: bound on the global norm of the trainable gradients; None: off.
    clip_apart: patterns, searched in the path: the gradients of the parameters
      that one is the first to match have a norm of their own, as have those
      that none matches.
    clip_from: number of steps at the start that are not clipped.
    groups: the first group whose pattern matches a parameter has it.
    decays: (path, ndim without the depth axis) -> whether it decays.
    layer_decay: factor g; layer k of a stack of depth L learns g^(L - k) as
      fast as what follows the stack, the embeddings g^(L + 1) as fast.
    layer_decay_stack: path of the module that holds the stack, for example
      'encoder'; needed only if there are several.
  """

  lr: Callable
  weight_decay: float | Callable = 0.05
  method: Callable = adam
  clip_norm: float | None = None
  clip_apart: tuple[str, ...] = ()
  clip_from: int = 0
  groups: tuple[Group, ...] = ()
  decays: Callable = decay_matrices
  layer_decay: float | None = None
  layer_decay_stack: str | None = None

  def __post_init__(self):
    """Refuse settings that mean nothing."""
    if self.clip_norm is not None and self.clip_norm <= 0:
      raise ValueError(f'config.optim.clip_norm={self.clip_norm}: must be > 0')
    if self.clip_norm is None and (self.clip_apart or self.clip_from):
      raise ValueError(
        'config.optim.clip_apart and clip_from need config.optim.clip_norm, '
        'found None'
      )
    if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
      raise ValueError(
        f'config.optim.layer_decay={self.layer_decay}: must lie in (0, 1]'
      )

  def lr_at(self, step: Any, total_steps: int) -> Any:
    """Return the learning rate of a step, before any group's factor."""
    return self.lr(step, total_steps)

  def build(
    self, params: PyTree, total_steps: int
  ) -> tuple[optax.GradientTransformation, tuple[Row, ...]]:
    """Return the transformation and how it treats each parameter.

    Args:
      params: parameters or their shape structs.
      total_steps: length of the run, for the schedules.

    Raises:
      ValueError: a group matches nothing, or layer decay finds no stack.
    """
    rows = self._rows(params, total_steps)
    table = {r.path: r for r in rows}
    parts = [
      self.method(_decay(self.weight_decay, total_steps, table), table),
      _scale(table),
      optax.scale_by_learning_rate(
        functools.partial(self.lr, total_steps=total_steps)
      ),
    ]
    if self.clip_norm is not None:
      for pattern in self.clip_apart:
        if not any(re.search(pattern, path) for path in table):
          raise ValueError(
            f'config.optim.clip_apart: {pattern!r} matches no parameter of\n  '
            + '\n  '.join(table)
          )
      parts.insert(0, _clip(self.clip_norm, self.clip_apart, self.clip_from))
    tx = optax.chain(*parts)
    if any(r.frozen for r in rows):
      labels = trees.map_with_path(
        lambda path, _: 'frozen' if table[path].frozen else 'trainable', params
      )
      tx = optax.multi_transform(
        {'trainable': tx, 'frozen': optax.set_to_zero()}, labels
      )
    return tx, rows

  def _rows(self, params: PyTree, total_steps: int) -> tuple[Row, ...]:
    shapes = {p: tuple(x.shape) for p, x in trees.path_leaves(params)}
    scales = self._layer_scales(shapes)
    scheduled = callable(self.weight_decay)
    if callable(self.weight_decay):
      default = float(self.weight_decay(0, total_steps))
    else:
      default = self.weight_decay
    rows, used = [], set()
    for path, shape in shapes.items():
      group = next((g for g in self.groups if re.search(g.pattern, path)), None)
      used.add(group)
      group = group or Group('')
      stacked = bool(trees.STACKED.search(path))
      decays = self.decays(path, len(shape) - stacked)
      own = group.weight_decay
      rows.append(
        Row(
          path=path,
          shape=shape,
          group=group.pattern,
          lr_scale=_times(scales.get(path, 1.0), group.lr_scale),
          weight_decay=default * decays if own is None else own,
          scheduled=scheduled and decays and own is None,
          stacked=stacked,
          frozen=group.freeze,
        )
      )
    unused = [g.pattern for g in self.groups if g not in used]
    if unused:
      raise ValueError(
        'config.optim.groups: no parameter is left for '
        + ', '.join(map(repr, unused))
        + ' (the first match wins); the parameters are:\n  '
        + '\n  '.join(shapes)
      )
    return tuple(rows)

  def _layer_scales(
    self, shapes: Mapping[str, tuple[int, ...]]
  ) -> dict[str, float | tuple[float, ...]]:
    """Return the factor of each parameter that layer decay slows down."""
    if self.layer_decay is None:
      return {}
    depths = _stacks(shapes)
    root = self.layer_decay_stack
    if root is None and len(depths) == 1:
      root = next(iter(depths))
    if root not in depths:
      raise ValueError(
        f'config.optim.layer_decay_stack={self.layer_decay_stack!r}: '
        'expected the module that holds the one stack of blocks to decay; '
        f'found stacks in {sorted(depths)}'
      )
    g, depth, scales = self.layer_decay, depths[root], {}
    prefix = f'{root}/' if root else ''
    for path in shapes:
      if not path.startswith(prefix):
        continue
      inner = path[len(prefix) :]
      layer = re.match(r'blocks_(\d+)/', inner)
      if inner.startswith('blocks/'):
        scales[path] = tuple(g ** (depth - k) for k in range(depth))
      elif layer:
        scales[path] = g ** (depth - int(layer[1]))
      elif _EMBEDDING.search(inner):
        scales[path] = g ** (depth + 1)
    return scales


def _stacks(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
  """Return {path of the module that holds a stack: depth}."""
  depths: dict[str, int] = {}
  for path, shape in shapes.items():
    found = re.match(r'(?:(.*?)/)?blocks(?:_(\d+))?/', path)
    if found:
      depth = int(found[2]) + 1 if found[2] else shape[0]
      root = found[1] or ''
      depths[root] = max(depths.get(root, 0), depth)
  return depths


def _times(
  scale: float | tuple[float, ...], factor: float
) -> float | tuple[float, ...]:
  if isinstance(scale, tuple):
    return tuple(s * factor for s in scale)
  return scale * factor


def _stateless(
  fn: Callable[..., jax.Array], *, needs_params: bool = False
) -> optax.GradientTransformation:
  """Lift `fn(path, update[, param])` to a transformation without state."""

  def update(updates, state, params=None):
    rest = (params,) if needs_params else ()
    return trees.map_with_path(fn, updates, *rest), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _scale(rows: Rows) -> optax.GradientTransformation:
  def scale(path: str, u: jax.Array) -> jax.Array:
    factor = rows[path].lr_scale
    if isinstance(factor, tuple):
      shape = (-1,) + (1,) * (u.ndim - 1)
      return u * jnp.asarray(factor, u.dtype).reshape(shape)
    return u if factor == 1.0 else u * factor

  return _stateless(scale)


def _clip(
  norm: float, apart: tuple[str, ...], first: int
) -> optax.GradientTransformation:
  """Bound the norm of each part of the gradients, from a step on."""
  if not apart and not first:
    return optax.clip_by_global_norm(norm)

  def part(path: str) -> str:
    return next((p for p in apart if re.search(p, path)), '')

  def clipped(updates):
    squares: dict[str, jax.Array] = {}
    for path, u in trees.path_leaves(updates):
      square = jnp.square(u).sum()
      squares[part(path)] = squares.get(part(path), 0.0) + square
    factors = {
      # Without a gradient there is nothing to scale.
      name: norm / jnp.maximum(jnp.sqrt(square), norm)
      for name, square in squares.items()
    }
    return trees.map_with_path(lambda path, u: u * factors[part(path)], updates)

  def update(updates, state, params=None):
    del params
    new = jax.tree.map(
      lambda c, u: jnp.where(state.count >= first, c, u),
      clipped(updates),
      updates,
    )
    count = optax.safe_increment(state.count)
    return new, optax.ScaleByScheduleState(count)

  return optax.GradientTransformation(
    lambda params: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)), update
  )


def _decay(
  weight_decay: float | Callable, total_steps: int, rows: Rows
) -> optax.GradientTransformation:
  """Add to each update its coefficient times its parameter."""

  def added(updates, params, value):
    def add(path: str, u: jax.Array, p: jax.Array) -> jax.Array:
      row = rows[path]
      c = value if row.scheduled else row.weight_decay
      return u if not row.scheduled and c == 0.0 else u + c * p

    return trees.map_with_path(add, updates, params)

  if not callable(weight_decay):
    return optax.GradientTransformation(
      lambda params: optax.EmptyState(),
      lambda updates, state, params=None: (
        added(updates, params, None),
        state,
      ),
    )

  def update(updates, state, params=None):
    value = weight_decay(state.count, total_steps)
    new = optax.ScaleByScheduleState(optax.safe_increment(state.count))
    return added(updates, params, value), new

  return optax.GradientTransformation(
    lambda params: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)), update
  )
