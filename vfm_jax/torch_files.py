"""Read files of `torch.save` without torch.

Such a file is a zip archive with one pickle, `data.pkl`, and one uncompressed
entry a storage. Unpickling runs what the pickle names, so only what a
checkpoint of weights needs can be named here: tensors, storages, OrderedDict
and argparse.Namespace, in which trainers keep their command line.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import math
import operator
import pathlib
import pickle
import sys
import zipfile
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import jax.numpy as jnp
import numpy as np


class ConversionError(ValueError):
  """A checkpoint can't be read, or does not fit the parameters."""


class Storage(NamedTuple):
  """Name a run of numbers that tensors are views of.

  Attributes:
    key: names the storage in its file; tied tensors share it.
    dtype: of its numbers, in the byte order of this machine.
    size: number of numbers.
    read: () -> array [size]; reads the file.
  """

  key: str
  dtype: np.dtype
  size: int
  read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Stand for a tensor whose numbers stay in the file until they are read.

  Attributes:
    storage: the numbers that it is a view of.
    offset: index of its first number.
    shape: lengths of its axes.
    strides: numbers from one entry to the next, by axis.
  """

  storage: Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]

  def __post_init__(self):
    reach = sum(
      (n - 1) * step for n, step in zip(self.shape, self.strides, strict=True)
    )
    last = self.offset + reach if math.prod(self.shape) else self.offset - 1
    if min(self.offset, *self.shape, *self.strides, 0) < 0 or (
      last >= self.storage.size
    ):
      raise ConversionError(
        f'a tensor of shape {self.shape} with strides {self.strides} from '
        f'{self.offset} does not lie in storage {self.storage.key} of '
        f'{self.storage.size}'
      )

  @property
  def dtype(self) -> np.dtype:
    """Type of its numbers."""
    return self.storage.dtype

  def read(self) -> np.ndarray:
    """Return a read-only view of the numbers."""
    return np.lib.stride_tricks.as_strided(
      self.storage.read()[self.offset :],
      self.shape,
      [self.dtype.itemsize * step for step in self.strides],
      writeable=False,
    )


def read(path: str | pathlib.Path) -> Any:
  """Return what was saved, with a `Tensor` in place of each tensor.

  Args:
    path: file of `torch.save` in its zip format, which torch writes since 1.6.

  Raises:
    ConversionError: the file is cut off, of another format, or names
      something else than tensors and what holds them.
  """
  path = pathlib.Path(path)
  with _explained(path), zipfile.ZipFile(path) as archive:
    # All entries are in a folder that is named like the file once was.
    entries = {name.partition('/')[2]: name for name in archive.namelist()}
    if 'data.pkl' not in entries:
      raise ConversionError(
        'expected the entry data.pkl of a torch file, found '
        f'{archive.namelist()[:5]}'
      )
    order = sys.byteorder
    if 'byteorder' in entries:
      order = archive.read(entries['byteorder']).decode().strip()

    def storage(kind, name, key, place, size):
      del place
      if kind != 'storage' or not isinstance(name, _Type):
        raise pickle.UnpicklingError(f'reference to a {kind!r}')
      entry = entries.get(f'data/{key}')
      if entry is None:
        raise ConversionError(f'expected an entry data/{key}, found none')
      found, wanted = (
        archive.getinfo(entry).file_size,
        size * name.dtype.itemsize,
      )
      if found != wanted:
        raise ConversionError(
          f'expected {wanted} bytes in data/{key}, found {found}'
        )
      swap = order != sys.byteorder
      reader = _reader(path, entry, name.dtype, swap)
      return Storage(key, name.dtype, size, reader)

    with archive.open(entries['data.pkl']) as file:
      return unpickle(file, storage)


def unpickle(file: IO[bytes], storage: Callable[..., Storage]) -> Any:
  """Load a pickle that may name what a checkpoint of weights needs.

  Args:
    file: the pickle.
    storage: makes a storage of the fields of its persistent id.

  Raises:
    ConversionError: the pickle is cut off or names something else.
  """
  try:
    return _Unpickler(file, storage).load()
  except ConversionError:
    raise
  except (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
  ) as e:
    raise ConversionError(f'the pickle in it is damaged: {e}') from e


class _Type(NamedTuple):
  """Stand for a class of storages."""

  dtype: np.dtype


_STORAGES = {
  'BFloat16Storage': jnp.bfloat16,
  'BoolStorage': np.bool_,
  'ByteStorage': np.uint8,
  'CharStorage': np.int8,
  'DoubleStorage': np.float64,
  'FloatStorage': np.float32,
  'HalfStorage': np.float16,
  'IntStorage': np.int32,
  'LongStorage': np.int64,
  'ShortStorage': np.int16,
}


def _tensor(storage, offset, size, strides, *rest):
  del rest  # whether it has a gradient, and its hooks
  shape, strides = (tuple(map(operator.index, x)) for x in (size, strides))
  return Tensor(storage, operator.index(offset), shape, strides)


def _parameter(tensor, *rest):
  del rest
  return tensor


_GLOBALS = {
  ('argparse', 'Namespace'): argparse.Namespace,
  ('collections', 'OrderedDict'): collections.OrderedDict,
  ('torch._utils', '_rebuild_tensor_v2'): _tensor,
  ('torch._utils', '_rebuild_parameter'): _parameter,
  **{
    ('torch', name): _Type(np.dtype(dtype)) for name, dtype in _STORAGES.items()
  },
}


class _Unpickler(pickle.Unpickler):
  """Refuse to name what is not in the table."""

  def __init__(self, file: IO[bytes], storage: Callable[..., Storage]):
    super().__init__(file, encoding='utf-8')
    # Tied tensors name the same storage; it is made once.
    self._storage = functools.cache(storage)

  def persistent_load(self, pid: Any) -> Storage:
    return self._storage(*pid)

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in _GLOBALS:
      raise ConversionError(
        f'it holds a {module}.{name}, which is not loaded: expected tensors in '
        'dicts; save the weights alone, as in torch.save(model.state_dict(), '
        '...)'
      )
    return _GLOBALS[module, name]


def _reader(path, entry, dtype, swap):
  @functools.cache
  def read():
    with _explained(path), zipfile.ZipFile(path) as archive:
      content = archive.read(entry)
    if not swap:
      return np.frombuffer(content, dtype)
    return np.frombuffer(content, f'u{dtype.itemsize}').byteswap().view(dtype)

  return read


@contextlib.contextmanager
def _explained(path):
  """Name the file in errors."""
  try:
    yield
  except zipfile.BadZipFile as e:
    raise ConversionError(
      f'{path}: cut off, or not in the zip format of torch.save ({e})'
    ) from e
  except ConversionError as e:
    raise ConversionError(f'{path}: {e}') from e
