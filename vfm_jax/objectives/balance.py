"""Keep a gate from always choosing the same prompts: balancing losses."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from vfm_jax.ops import gating


@dataclasses.dataclass(frozen=True)
class Balance:
  """Punish uneven importance and load of the prompts (`models.prompts`).

  An `objectives.base.Auxiliary`. With the weights g of the examples and P, how
  likely each prompt has one, of prompts i in layer l:

  'canonical' (arXiv:1701.06538, eqs. 6 to 11): the importance is the squared
  coefficient of variation (variance over squared mean), over prompts, of the
  sum of g over the batch, and the load that of P; both are averaged over the
  layers.

  'official' is what the released code of DMP (arXiv:2405.17825) computes: the
  importance is that of the sum of g over the layers, over all prompts of all
  examples, with the unbiased variance, and 0 for a single example; the load
  is the sum of P over prompts and examples, averaged over the layers, and 0
  where no noise decides, as with all prompts chosen.

  Attributes:
    importance: factor of the importance.
    load: factor of the load.
    form: see above.
  """

  importance: float = 1.0
  load: float = 1.0
  form: Literal['canonical', 'official'] = 'canonical'

  def __call__(
    self,
    values: Mapping[str, jax.Array],
    tau: jax.Array,
    valid: jax.Array,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the weighted sum f32 [], and both parts without their factors.

    Args:
      values: `prompt_gates` and `prompt_load` f32 [L, B, n], `prompt_drawn`
        f32 [L]; zeros in layers without prompts.
      tau: not used.
      valid: f32 [B], 0 for examples that do not count.
    """
    del tau
    gates = values['prompt_gates'] * valid[:, None]
    load = values['prompt_load'] * valid[:, None]
    # Each layer with prompts has gates that add up to 1.
    layers = (values['prompt_gates'] > 0).any((1, 2)).sum()
    if self.form == 'canonical':
      importance = gating.cv_squared(gates.sum(1)).sum() / layers
      load = gating.cv_squared(load.sum(1)).sum() / layers
    else:
      importance = _over_layers(gates.sum(0), valid)
      drawn = values['prompt_drawn'][:, None, None]
      load = (drawn * load).sum() / layers
    total = self.importance * importance + self.load * load
    return total, {'importance': importance, 'load': load}


def _over_layers(sums: jax.Array, valid: jax.Array) -> jax.Array:
  """Return the official importance of gates [B, n], summed over layers."""
  inside = valid[:, None]
  count = valid.sum() * sums.shape[1]
  mean = sums.sum() / jnp.maximum(count, 1.0)
  squares = (jnp.square(sums - mean) * inside).sum()
  variance = squares / jnp.maximum(count - 1.0, 1.0)
  ratio = variance / (jnp.square(mean) + 1e-10)
  return jnp.where(valid.sum() > 1, ratio, 0.0)
