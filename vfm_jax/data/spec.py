"""Describe arrays without jax."""

from typing import Any

import numpy as np


class ArraySpec:
  """Describe an array as `jax.ShapeDtypeStruct` does, without jax.

  Attributes:
    shape: sizes of the axes.
    dtype: numpy type.
  """

  def __init__(self, shape: tuple[int, ...], dtype: Any):
    self.shape = tuple(shape)
    self.dtype = np.dtype(dtype)

  def __eq__(self, other: object) -> bool:
    return (
      isinstance(other, ArraySpec)
      and self.shape == other.shape
      and self.dtype == other.dtype
    )

  def __hash__(self) -> int:
    return hash((self.shape, self.dtype))

  def __repr__(self) -> str:
    return f'ArraySpec({self.dtype}{list(self.shape)})'
