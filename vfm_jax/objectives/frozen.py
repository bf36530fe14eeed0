"""Hand an objective weights that are neither trained nor saved.

Such weights come from files. They enter a compiled program as arguments, beside
the parameters, and not as constants of it.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax

from vfm_jax.objectives.base import PyTree


@runtime_checkable
class Frozen(Protocol):
  """Optional: keep weights beside the parameters in evaluations."""

  def frozen(self) -> Mapping[str, PyTree]:
    """Return trees by name, none of which is a name in the parameters."""
    ...


@runtime_checkable
class Taught(Protocol):
  """Optional: find weights of teachers beside the parameters in training.

  They are neither optimised nor saved. Evaluations do not get them.
  """

  def teacher_spec(self) -> Mapping[str, PyTree]:
    """Return shapes and types by name, without reading a file."""
    ...

  def teachers(self) -> Mapping[str, PyTree]:
    """Return trees by name, none of which is a name in the parameters."""
    ...


@runtime_checkable
class Decoder(Protocol):
  """Turn latents into pictures with weights of its own; hashable or not."""

  def weights(self) -> PyTree | None:
    """Return the weights; None where there are none to decode with."""
    ...

  def decode(self, weights: PyTree, z: jax.Array) -> jax.Array:
    """Return pictures f32 [B, (T,) H, W, C], about in [-1, 1].

    Args:
      weights: from `weights`.
      z: f32 [B, (T,) h, w, c] latents as a diffusion model learns them.
    """
    ...


def teacher_spec(objective: Any) -> dict[str, PyTree]:
  """Return shapes and types of the teachers of an objective, {} for none."""
  if not isinstance(objective, Taught):
    return {}
  return dict(objective.teacher_spec())


def with_frozen(objective: Any, params: PyTree) -> PyTree:
  """Return the parameters and, beside them, the frozen weights, if any.

  Call it outside of `jax.jit`, on what goes to `sample` or `visualise`.

  Args:
    objective: that may satisfy `Frozen`.
    params: its parameters, or an average of them.
  """
  frozen = objective.frozen() if isinstance(objective, Frozen) else {}
  if not frozen:
    return params
  placed = getattr(jax.tree.leaves(params)[0], 'sharding', None)
  everywhere = None
  if isinstance(placed, jax.sharding.NamedSharding):
    everywhere = jax.sharding.NamedSharding(
      placed.mesh, jax.sharding.PartitionSpec()
    )
  return {**params, **jax.device_put(dict(frozen), everywhere)}
