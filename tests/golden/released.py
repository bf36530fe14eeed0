"""Share what runners need of the released layout: axes and names of torch."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from vfm_jax import convert_dit, trees
from vfm_jax.models.dit import DiT
from vfm_jax.nn import adaln


def last(x):
  """Move channels last: [..., C, H, W] to [..., H, W, C]."""
  return jnp.asarray(np.moveaxis(np.asarray(x), -3, -1))


def first(x):
  """Move channels first: [..., H, W, C] to [..., C, H, W]."""
  if not isinstance(x, jax.core.Tracer):
    x = np.asarray(x)
  return np.moveaxis(x, -1, -3)


def dit(cfg, hooks=None, **fields):
  """Return the DiT of a case's config, with some fields otherwise."""
  found = dict(
    width=cfg['hidden_size'],
    depth=cfg['depth'],
    heads=cfg['num_heads'],
    mlp_ratio=cfg.get('mlp_ratio', 4.0),
    patch=cfg['patch_size'],
    input_size=cfg['input_size'],
    channels=cfg['in_channels'],
    learn_sigma=cfg.get('learn_sigma', True),
    num_classes=cfg['num_classes'],
    label_dropout=cfg.get('class_dropout_prob', 0.1),
  )
  return DiT(**(found | fields), hooks=hooks or adaln.Hooks())


def dit_params(model, arrays, prefix='w/'):
  """Return the parameters of a DiT or SiT from the arrays of a case."""
  side, zero = model.input_size, jnp.zeros(1)
  x = jnp.zeros((1, side, side, model.channels))
  y = zero.astype(jnp.int32)
  make = functools.partial(model.init, tau=y)
  shapes = jax.eval_shape(make, jax.random.key(0), x, zero, y)
  state = {
    k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)
  }
  return convert_dit.from_dit(state, shapes['params'], model=model)


def gradients(arrays, grads, find, state):
  """Return our gradients for the recorded ones, by official name.

  A full gradient of ours is given in the official layout, by inverting the
  conversion on the positions of the entries.

  Args:
    arrays: of the case.
    grads: by our paths, with unrolled blocks.
    find: the layout, see `convert.fill`.
    state: the official weights by name.
  """
  flat = dict(trees.path_leaves(grads))
  by_name = {
    source.names[0]: (path, source)
    for path, source in find(tuple(flat), state).items()
  }
  out = {}
  for name in arrays:
    kind, _, key = name.partition('/')
    if kind not in ('grad', 'gradnorm'):
      continue
    path, source = by_name[key]
    grad = np.asarray(flat[path], np.float64)
    if kind == 'gradnorm':
      out[name] = math.sqrt(np.square(grad).sum())
      continue
    shape = arrays[name].shape
    numbers = np.arange(grad.size).reshape(shape)
    places = source.convert(numbers, grad.shape)
    official = np.empty(grad.size)
    official[places.ravel()] = grad.ravel()
    out[name] = official.reshape(shape)
  return out
