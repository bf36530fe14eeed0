"""Choose the label rows that condition a denoiser."""

from typing import Any

import jax
import jax.numpy as jnp


def choose(
  model: Any, y: jax.Array | None, drop: jax.Array | None, batch: int
) -> jax.Array:
  """Return int32 [B] labels, with the null label where one is missing.

  Args:
    model: has `null_label`, int or None, and `label_dropout`.
    y: int32 [B] labels; None for the null label.
    drop: bool [B], True replaces the label by the null label.
    batch: B.

  Raises:
    ValueError: the null label is asked for and there is none.
  """
  null = model.null_label
  if null is None:
    if y is not None and drop is None:
      return y
    raise ValueError(
      'an input without a label needs the null label, for which '
      '`denoiser.label_dropout` must be above 0, found '
      f'{model.label_dropout}'
    )
  if y is None:
    return jnp.full(batch, null)
  return y if drop is None else jnp.where(drop, null, y)
