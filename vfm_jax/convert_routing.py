"""Check, leave out and write the fixed tables of released routed models.

DTR keeps the masks of each block in its checkpoints, Switch-DiT the prior of
its auxiliary loss and the numbers of all times. None is a parameter here; a
table of another model would be another network all the same, so each must be
the one that the model computes.
"""

import re
from collections.abc import Collection

import numpy as np

from vfm_jax import convert
from vfm_jax.models import routing, switch
from vfm_jax.models.dit import DiT
from vfm_jax.ops import routing as masks
from vfm_jax.ops.process import NOISE_LEVELS

_TABLE = re.compile(r'(blocks\.\d+\.routing|prior)\._unit_mapping|full_time')


def tables(model: DiT) -> dict[str, np.ndarray]:
  """Return the tables of a model, float32, by their released names.

  Args:
    model: with the hooks of `models.routing` or `models.switch`; others have
      none. The prior is that of alpha 4, as released.
  """
  hook, depth, out = model.hooks.mask, model.dims.depth, {}
  if isinstance(hook, routing.Routes):
    for i in range(depth):
      name = f'blocks.{i}.routing._unit_mapping'
      out[name] = hook.table(model.dims.width, i)
  elif isinstance(hook, switch.Experts):
    count, active = depth * hook.count, depth * hook.top_k
    out['prior._unit_mapping'] = masks.sliding_window(count, active)
    out['full_time'] = np.arange(NOISE_LEVELS)
  return {name: table.astype(np.float32) for name, table in out.items()}


def without_tables(
  state: convert.State, model: DiT | None, ignore: Collection[str] = ()
) -> dict[str, np.ndarray]:
  """Return a checkpoint without its tables.

  Args:
    state: tensors by name.
    model: that the tables must be of; None for one without.
    ignore: regular expressions of tables to leave as they are.

  Raises:
    ConversionError: a table is not one of the model.
  """
  known = {} if model is None else tables(model)
  out = {}
  for name, tensor in state.items():
    kept = any(re.fullmatch(rule, name) for rule in ignore)
    if kept or not _TABLE.fullmatch(name):
      out[name] = tensor
    elif name not in known or not np.array_equal(tensor, known[name]):
      found = None if model is None else model.hooks.mask
      raise convert.ConversionError(
        f'{name} {np.shape(tensor)} is not a table of the model, whose '
        f'`denoiser.hooks.mask` is {found}: expected '
        f'{"another one" if name in known else "none"}; set `denoiser.hooks` '
        'to Hooks(mask=Routing(alpha=..., beta=...)) for DTR, or to '
        'switch(experts=..., top_k=...)'
      )
  return out
