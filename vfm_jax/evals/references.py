"""Read and write what generated images are compared with, in ADM's layout.

A reference is an .npz file with `mu`, `sigma` (and for sFID `mu_s`, `sigma_s`)
float, with `arr_0` uint8 [N, H, W, 3], or with both, as the evaluator of ADM
reads them and the `sample` verb writes them.
"""

import os
import pathlib
import re
import zipfile
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from vfm_jax.data.shards import sha256
from vfm_jax.evals.frechet import Normal

# The entries of the file, by the part of the activations that they describe.
_ENTRIES = {'pool': ('mu', 'sigma'), 'spatial': ('mu_s', 'sigma_s')}
_DIGITS = 12


class BadReference(ValueError):
  """Say what is wrong with a reference file."""


class Reference(NamedTuple):
  """Hold the content of a reference file.

  Attributes:
    path: of the file.
    sha256: of its bytes, 64 hexadecimal digits.
    normals: distributions by part of the activations: `pool`, `spatial`.
    images: uint8 [N, H, W, 3], or None.
  """

  path: pathlib.Path
  sha256: str
  normals: Mapping[str, Normal]
  images: np.ndarray | None

  @property
  def name(self) -> str:
    """Name of the file and the first 12 digits of its hash, for metrics."""
    stem = re.sub(r'\W+', '-', self.path.stem)
    return f'{stem}-{self.sha256[:_DIGITS]}'


def read_reference(path: str | os.PathLike) -> Reference:
  """Read a reference file.

  Raises:
    BadReference: there is no such file, it is cut off, it has neither
      statistics nor images, or one has the wrong shape or type.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise BadReference(
      f'no reference file at {path}; make one with write_statistics, use the '
      'npz of a `sample` run or one that ADM released, and name it in '
      '`reference` of the evaluator'
    )
  try:
    with np.load(path, allow_pickle=False) as file:
      wanted = {'arr_0', *(e for pair in _ENTRIES.values() for e in pair)}
      arrays = {k: file[k] for k in file.files if k in wanted}
      found = sorted(file.files)
  except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
    raise BadReference(f'{path}: expected an .npz file: {e}') from e
  if not {'arr_0', 'mu'} & set(arrays):
    raise BadReference(
      f'{path}: expected `mu` and `sigma`, or images `arr_0`, found {found}'
    )
  normals = {
    part: _normal(path, arrays, *entries)
    for part, entries in _ENTRIES.items()
    if entries[0] in arrays or entries[1] in arrays
  }
  images = arrays.get('arr_0')
  if images is not None:
    check_images(f'{path}: arr_0', images)
  return Reference(path, sha256(path), normals, images)


def write_statistics(
  path: str | os.PathLike, normals: Mapping[str, Normal]
) -> str:
  """Write statistics that `read_reference` and the evaluator of ADM read.

  Args:
    path: of the .npz file.
    normals: distributions by part: `pool`, and for sFID `spatial`.

  Returns:
    The sha256 of the file.

  Raises:
    BadReference: a part has no entry in the layout.
  """
  path = pathlib.Path(path)
  if path.suffix != '.npz' or not set(normals) <= set(_ENTRIES):
    raise BadReference(
      f'expected an .npz file and parts among {sorted(_ENTRIES)}, found '
      f'{path} and {sorted(normals)}'
    )
  arrays = {}
  for part, normal in normals.items():
    arrays |= dict(zip(_ENTRIES[part], normal, strict=True))
  np.savez(path, **arrays)
  return sha256(path)


def check_images(name: str, images: np.ndarray) -> None:
  """Raise a BadReference unless images are uint8 [N, H, W, 3], N > 0."""
  shape = images.shape
  if images.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
    raise BadReference(
      f'{name}: expected uint8 [N, H, W, 3], found {images.dtype} {list(shape)}'
    )


def _normal(path, arrays, mean, cov) -> Normal:
  for name, rank in ((mean, 1), (cov, 2)):
    x = arrays.get(name)
    if x is None or x.ndim != rank or not np.issubdtype(x.dtype, np.floating):
      shown = None if x is None else f'{x.dtype} {list(x.shape)}'
      raise BadReference(
        f'{path}: expected {name} float {"[D, D]" if rank == 2 else "[D]"}, '
        f'found {shown}'
      )
    if not np.isfinite(x).all():
      raise BadReference(f'{path}: NaN or infinity in {name}')
  d = len(arrays[mean])
  if arrays[cov].shape != (d, d):
    raise BadReference(
      f'{path}: expected {cov} [{d}, {d}] for {mean} [{d}], found '
      f'{list(arrays[cov].shape)}'
    )
  return Normal(*(arrays[k].astype(np.float64) for k in (mean, cov)))
