"""Resolve what a model's size and its own fields say together."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from vfm_jax.ops import tokens as tok

Dims = TypeVar('Dims')


def resolve(sizes: Mapping[str, Dims], model: Any, path: str) -> Dims:
  """Return the dimensions of `model.size`, with the model's own in their place.

  Args:
    sizes: dimensions by size letter, frozen dataclasses.
    model: has `size`, and a field for each dimension: None leaves it.
    path: config path of the model, for the message.

  Raises:
    ValueError: there is no such size.
  """
  if model.size not in sizes:
    raise ValueError(
      f'expected `{path}.size` in {list(sizes)}, found {model.size!r}'
    )
  dims: Any = sizes[model.size]
  given = {f.name: getattr(model, f.name) for f in dataclasses.fields(dims)}
  given = {n: v for n, v in given.items() if v is not None}
  return dataclasses.replace(dims, **given)


def built_grid(
  size: int | tuple[int, int], frames: int, patch: tok.Grid, path: str
) -> tok.Grid:
  """Return the token grid that positions are built for.

  Args:
    size: rows and columns of an image, or one number for both.
    frames: number of frames.
    patch: frames, rows and columns of a token.
    path: config path of the model, for messages.
  """
  height, width = (size, size) if isinstance(size, int) else size
  return tok.token_grid((1, frames, height, width, 1), patch, path=path)
