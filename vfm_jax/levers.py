"""Change a run so that its step takes less memory on a device."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from vfm_jax import describe, sharding
from vfm_jax.experiment import Experiment


def layout_bytes(exp: Experiment, num_devices: int) -> dict[str, int]:
  """Return bytes a device of what lives from step to step, by category.

  Raises:
    ShardingError: the mesh or a parameter does not divide.
  """
  sizes = exp.mesh.sizes(num_devices)
  found = describe.bytes_a_device(
    exp.abstract_state, exp.shardings(sizes), exp.batch_spec, sizes
  )
  # A compiler counts gradients among what it makes in a step.
  del found['gradients']
  if exp.teacher_spec:
    places = jax.tree.leaves(exp.teacher_shardings(sizes))
    leaves = jax.tree.leaves(exp.teacher_spec)
    found['teachers'] = sum(
      sharding.device_bytes(x, s) for x, s in zip(leaves, places, strict=True)
    )
  return {name: n for name, n in found.items() if n}


def exact(exp: Experiment, num_devices: int) -> dict[str, int]:
  """Return the bytes of a device that another layout saves, by its name.

  That is arithmetic: the mean of what a device holds between two steps.
  """
  now = sum(layout_bytes(exp, num_devices).values())
  found = {}
  for name, other in _layouts(exp, num_devices).items():
    try:
      found[name] = now - sum(layout_bytes(other, num_devices).values())
    except sharding.ShardingError:
      continue  # a width does not divide that far
  return found


def compiled(exp: Experiment, num_devices: int) -> dict[str, Experiment]:
  """Return runs that may need less, by their name; only a compiler knows."""
  found = {}
  policies = remat_policies(exp.objective)
  for policy in ('dots', 'full'):
    if policies - {policy}:
      objective = with_remat(exp.objective, policy)
      found[f'remat={policy}'] = dataclasses.replace(exp, objective=objective)
  sizes, accum = exp.mesh.sizes(num_devices), 2 * exp.accum
  parts = math.prod(sizes[a] for a in sharding.BATCH)
  if exp.batch_size % (accum * parts) == 0:
    found[f'accum={accum}'] = dataclasses.replace(exp, accum=accum)
  return found


def with_remat(value: Any, policy: str) -> Any:
  """Return `value` with the remat policy of each module in it replaced."""
  return _changed(value, lambda _: policy)


def remat_policies(value: Any) -> set[str]:
  """Return the remat policies of the modules in `value`."""
  found: set[str] = set()

  def look(policy: str) -> str:
    found.add(policy)
    return policy

  _changed(value, look)
  return found


def _changed(value: Any, change: Callable[[str], str]) -> Any:
  """Map `change` over the fields `remat` of the dataclasses in a value."""
  if isinstance(value, tuple | list):
    return type(value)(_changed(v, change) for v in value)
  if isinstance(value, Mapping):
    return {k: _changed(v, change) for k, v in value.items()}
  if not dataclasses.is_dataclass(value) or isinstance(value, type):
    return value
  new = {}
  for field in dataclasses.fields(value):
    # Linen sets these two itself.
    if not field.init or field.name in ('parent', 'name'):
      continue
    old = getattr(value, field.name)
    now = change(old) if field.name == 'remat' else _changed(old, change)
    if now is not old and now != old:
      new[field.name] = now
  if not new:
    return value
  if isinstance(value, nn.Module):
    return value.clone(**new)
  return dataclasses.replace(value, **new)


def _layouts(exp: Experiment, num_devices: int) -> dict[str, Experiment]:
  """Return runs that differ in nothing but how the state is kept."""
  found = {}
  method: Any = exp.optim.method
  # Of what is bound already, the signature shows the value as the default.
  moments = inspect.signature(method).parameters.get('mu_dtype')
  if moments is not None and moments.default != 'bfloat16':
    half = functools.partial(method, mu_dtype='bfloat16')
    found['bfloat16 first moments'] = dataclasses.replace(
      exp, optim=dataclasses.replace(exp.optim, method=half)
    )
  sizes = exp.mesh.sizes(num_devices)
  wider = 2 * sizes['fsdp']
  while sizes['data'] * sizes['fsdp'] % wider == 0:
    mesh = dataclasses.replace(exp.mesh, data=-1, fsdp=wider)
    found[f'fsdp={wider}'] = dataclasses.replace(exp, mesh=mesh)
    wider *= 2
  return found
