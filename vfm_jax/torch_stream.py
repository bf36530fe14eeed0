"""Read files that torch wrote before 1.6 without torch.

Such a file is a run of pickles: a magic number, a version, the machine, what
was saved and the keys of its storages, whose numbers follow, each with its
length before it. Many released weights are still in this format.
"""

import pathlib
import struct
import sys
from typing import IO, Any

import numpy as np

from vfm_jax import torch_files
from vfm_jax.torch_files import ConversionError, Storage

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_ZIP = b'PK'


def is_stream(path: str | pathlib.Path) -> bool:
  """Return whether a file of `torch.save` is not in its zip format."""
  with pathlib.Path(path).open('rb') as file:
    return file.read(2) != _ZIP


def read(path: str | pathlib.Path) -> Any:
  """Return what was saved, as `torch_files.read` does.

  Raises:
    ConversionError: the file is cut off, of another format, or names
      something else than tensors and what holds them.
  """
  path = pathlib.Path(path)
  try:
    with path.open('rb') as file:
      return _read(path, file)
  except ConversionError as e:
    raise ConversionError(f'{path}: {e}') from e


def _read(path: pathlib.Path, file: IO[bytes]) -> Any:
  storages: dict[str, Storage] = {}
  places: dict[str, int] = {}

  def storage(kind, name, key, place, size, view):
    del place
    if kind != 'storage' or view is not None:
      raise ConversionError(f'expected whole storages, found {kind!r} {view}')

    def numbers() -> np.ndarray:
      return np.fromfile(path, name.dtype, size, offset=places[key])

    storages[key] = Storage(key, name.dtype, size, numbers)
    return storages[key]

  def load():
    return torch_files.unpickle(file, storage)

  if load() != _MAGIC or load() != _VERSION:
    raise ConversionError('expected a file of torch.save, found another pickle')
  machine = load()
  if machine.get('little_endian') != (sys.byteorder == 'little'):
    raise ConversionError(
      f'written on a machine of another byte order than this one: {machine}'
    )
  saved, keys = load(), load()
  if sorted(keys) != sorted(storages):
    raise ConversionError(
      f'expected the storages {sorted(storages)}, found {sorted(keys)}'
    )
  for key in keys:
    wanted = storages[key].size
    found = struct.unpack('<q', file.read(8).ljust(8, b'\xff'))[0]
    if found != wanted:
      raise ConversionError(
        f'cut off or damaged: expected {wanted} numbers in storage {key}, '
        f'found {found}'
      )
    places[key] = file.tell()
    file.seek(wanted * storages[key].dtype.itemsize, 1)
  if file.tell() > path.stat().st_size:
    raise ConversionError(
      f'cut off: expected {file.tell()} bytes, found {path.stat().st_size}'
    )
  return saved
