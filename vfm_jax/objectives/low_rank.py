"""Adapt a trained network by low-rank updates of its kernels (LoRA)."""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from vfm_jax import trees
from vfm_jax.nn import layers
from vfm_jax.objectives import base

# Name of the updates among the parameters.
NAME = 'lora'


@dataclasses.dataclass(frozen=True)
class LowRank:
  """Train W + (alpha / rank) A B in place of W, for any objective.

  LoRA (arXiv:2106.09685, equation 3), with B = 0 at first: the network starts
  as what it was. The pairs are parameters of their own,
  `lora/<path of the kernel>/{a,b}`; which of the others move is for the
  optimizer's groups to say, as in

    groups=(ref(Group, pattern='^lora/'), ref(Group, pattern='head/'),
            ref(Group, pattern='.', freeze=True))

  A kernel of several output axes, as the fused one of queries, keys and
  values, has one pair for all of them; the paper's own choice, queries and
  values alone with a pair each, is not offered. Ours.

  Attributes:
    objective: what is trained; its parameters keep their paths.
    rank: of the updates.
    alpha: factor of the updates, over the rank.
    pattern: regular expression, searched in paths of parameters.
  """

  objective: base.Objective
  rank: int = 8
  alpha: float = 16.0
  pattern: str = r'/(qkv|proj|fc1|fc2)/kernel$'

  def __post_init__(self):
    """Refuse settings that mean nothing."""
    if self.rank < 1:
      raise ValueError(f'objective.rank must be 1 or more, found {self.rank}')

  def init(
    self, rng: jax.Array, batch: base.Batch
  ) -> tuple[base.PyTree, base.PyTree]:
    """Return the objective's parameters with the updates beside them.

    Raises:
      ValueError: the pattern finds nothing, or what is no matrix.
    """
    params, extra = self.objective.init(jax.random.fold_in(rng, 0), batch)
    pairs: dict[str, Any] = {}
    for number, (path, kernel) in enumerate(trees.path_leaves(params)):
      if re.search(self.pattern, path):
        key = jax.random.fold_in(jax.random.fold_in(rng, 1), number)
        at = pairs
        for part in path.split('/'):
          at = at.setdefault(part, {})
        at |= self._pair(key, path, kernel.shape)
    if not pairs:
      raise ValueError(
        f'objective.pattern {self.pattern!r} finds no parameter; they are:\n  '
        + '\n  '.join(path for path, _ in trees.path_leaves(params))
      )
    return {**params, NAME: pairs}, extra

  def loss(
    self,
    params: base.PyTree,
    extra: base.PyTree,
    batch: base.Batch,
    rng: jax.Array,
    *,
    train: bool,
  ) -> base.LossOut:
    """Return the objective's loss with the updated kernels."""
    merged = self.merge(params)
    return self.objective.loss(merged, extra, batch, rng, train=train)

  def after_update(
    self, extra: Any, params: Any, step: jax.Array, metrics: Any
  ) -> base.PyTree:
    """Return the objective's non-gradient state after a step."""
    merged = self.merge(params)
    return self.objective.after_update(extra, merged, step, metrics)

  def merge(self, params: base.PyTree) -> dict[str, Any]:
    """Return parameters of `objective` that hold the updates within."""
    pairs = dict(trees.path_leaves(params[NAME]))
    inner = {k: v for k, v in params.items() if k != NAME}

    def add(path: str, kernel: jax.Array) -> jax.Array:
      if f'{path}/a' not in pairs:
        return kernel
      update = pairs[f'{path}/a'] @ pairs[f'{path}/b']
      scaled = (self.alpha / self.rank) * update
      return kernel + scaled.reshape(kernel.shape)

    return trees.map_with_path(add, inner)

  def check(self, batch: base.Batch) -> None:
    """Let the objective look at a batch, if it does."""
    if isinstance(self.objective, base.Checks):
      self.objective.check(batch)

  def embed(self, params: base.PyTree, batch: base.Batch) -> jax.Array:
    """Return what the objective embeds, f32 [B, D]."""
    return self._inner('embed')(self.merge(params), batch)

  def tokens(self, params: base.PyTree, batch: base.Batch) -> jax.Array:
    """Return the objective's tokens, f32 [B, n, D]."""
    return self._inner('tokens')(self.merge(params), batch)

  def logits(self, params: base.PyTree, batch: base.Batch) -> jax.Array:
    """Return the objective's logits, f32 [B, num_classes]."""
    return self._inner('logits')(self.merge(params), batch)

  def _inner(self, name: str) -> Any:
    found = getattr(self.objective, name, None)
    if found is None:
      raise TypeError(
        f'config.objective.objective: {type(self.objective).__name__} has no '
        f'{name}(params, batch)'
      )
    return found

  def _pair(self, rng, path: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Return A, drawn from U(+-1/sqrt(inputs)), and B = 0."""
    depth = shape[:1] if trees.STACKED.search(path) else ()
    ins, *outs = shape[len(depth) :]
    if not outs:
      raise ValueError(
        f'objective.pattern {self.pattern!r} finds {path} of shape {shape}: '
        'expected matrices, with inputs on their first axis'
      )
    draw = layers.uniform_fan_in(ins)
    return {
      'a': draw(rng, (*depth, ins, self.rank)),
      'b': jnp.zeros((*depth, self.rank, math.prod(outs))),
    }
