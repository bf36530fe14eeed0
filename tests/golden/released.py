"""Share what runners need of the released layout: axes and names of torch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vfm_jax import convert_dit


def last(x):
  """Move channels last: [..., C, H, W] to [..., H, W, C]."""
  return jnp.moveaxis(jnp.asarray(x), -3, -1)


def first(x):
  """Move channels first: [..., H, W, C] to [..., C, H, W]."""
  return np.moveaxis(np.asarray(x), -1, -3)


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
