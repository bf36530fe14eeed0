"""Say what follows from a denoiser's labels, and choose their rows."""

import jax
import jax.numpy as jnp


class Labelled:
  """Give a denoiser what follows from its fields, which its class declares."""

  channels: int
  learn_sigma: bool
  num_classes: int
  label_dropout: float

  @property
  def out_channels(self) -> int:
    """Return the number of channels of the output."""
    return self.channels * (2 if self.learn_sigma else 1)

  @property
  def null_label(self) -> int | None:
    """Return the label that stands for none, or None if there is none."""
    return self.num_classes if self.label_dropout > 0 else None

  @property
  def label_rows(self) -> int:
    """Return the number of rows of the table of labels, null included."""
    return self.num_classes + (self.null_label is not None)

  def choose_labels(
    self, y: jax.Array | None, drop: jax.Array | None, batch: int
  ) -> jax.Array | None:
    """Return int32 [B] rows, the null label where one is missing.

    Args:
      y: int32 [B] labels; None for the null label, or for no labels.
      drop: bool [B], True replaces the label by the null label.
      batch: B.

    Returns:
      The rows, or None where `num_classes` is 0.

    Raises:
      ValueError: the null label is asked for and there is none, or labels are
        given to a denoiser that has none.
    """
    if not self.num_classes:
      if y is not None or drop is not None:
        raise ValueError('labels need `denoiser.num_classes`, found 0')
      return None
    null = self.null_label
    if null is None:
      if y is not None and drop is None:
        return y
      raise ValueError(
        'an input without a label needs the null label, for which '
        '`denoiser.label_dropout` must be above 0, found '
        f'{self.label_dropout}'
      )
    if y is None:
      return jnp.full(batch, null)
    return y if drop is None else jnp.where(drop, null, y)
