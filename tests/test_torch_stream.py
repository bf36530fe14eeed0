"""Check the reader of torch's older format on files that are made by hand."""

import io
import pickle
import struct

import numpy as np
import pytest

from vfm_jax import convert, torch_stream
from vfm_jax.torch_files import ConversionError

NUMBERS = np.arange(6, dtype=np.float32)
MACHINE = {'protocol_version': 1001, 'little_endian': True, 'type_sizes': {}}


class Name:
  """Pickle as the name of something in another module."""

  def __init__(self, module, name):
    self.module, self.name = module, name


class Call:
  """Pickle as a call of a name."""

  def __init__(self, name, *args):
    self.name, self.args = name, args


class Pickler(pickle._Pickler):
  """Write names and calls of what is not installed, and storages."""

  def save(self, obj, *args, **kwargs):
    if isinstance(obj, Name):
      self.write(f'c{obj.module}\n{obj.name}\n'.encode())
    elif isinstance(obj, Call):
      self.save(obj.name)
      self.save(obj.args)
      self.write(b'R')
    else:
      super().save(obj, *args, **kwargs)

  def persistent_id(self, obj):
    return obj.fields if isinstance(obj, Stored) else None


class Stored:
  """Pickle as a reference to a storage."""

  def __init__(self, key='7', kind='FloatStorage', size=6, view=None):
    kind = Name('torch', kind)
    self.fields = ('storage', kind, key, 'cpu', size, view)


def tensor(shape, strides, offset=0, **storage):
  return Call(
    Name('torch._utils', '_rebuild_tensor_v2'),
    *(Stored(**storage), offset, shape, strides, False, {}),
  )


def pickled(value):
  out = io.BytesIO()
  Pickler(out, 2).dump(value)
  return out.getvalue()


def stream(saved, storages=(('7', NUMBERS),), machine=MACHINE):
  head = (torch_stream._MAGIC, 1001, machine, saved, [k for k, _ in storages])
  body = [struct.pack('<q', x.size) + x.tobytes() for _, x in storages]
  return b''.join([*map(pickled, head), *body])


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'x.pth'


def test_views_of_several_storages(path):
  state = {
    'module.whole': tensor((2, 3), (3, 1)),
    'module.transposed': tensor((3, 2), (1, 3)),
    'module.half': tensor((2,), (1,), 1, key='8', kind='HalfStorage', size=3),
  }
  halves = np.float16([1, 2, 3])
  path.write_bytes(
    stream({'state_dict': state}, [('8', halves), ('7', NUMBERS)])
  )
  assert torch_stream.is_stream(path)
  got = convert.read_checkpoint(path)
  whole = NUMBERS.reshape(2, 3)
  np.testing.assert_array_equal(got['whole'], whole)
  np.testing.assert_array_equal(got['transposed'], whole.T)
  np.testing.assert_array_equal(got['half'], [2, 3])
  assert {x.dtype for x in got.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (pickle.dumps({'a': 1}), 'found another pickle'),
    (b'', 'pickle in it is damaged'),
    (stream({}, machine={**MACHINE, 'little_endian': False}), 'byte order'),
    (stream({'a': tensor((7,), (1,))}), 'does not lie in storage 7'),
    (stream({'a': tensor((6,), (1,), size=9)}), 'expected 9 numbers'),
    (stream({'a': tensor((6,), (1,), view=('8', 0, 6))}), 'whole storages'),
    (stream({'a': tensor((6,), (1,))}, ()), r"storages \['7'\], found \[\]"),
    (stream({'a': tensor((6,), (1,))})[:-1], 'cut off: expected'),
    (stream({'a': tensor((6,), (1,))})[:-30], 'cut off or damaged'),
    (stream({'a': tensor((6,), (1,))})[:60], 'damaged'),
    (stream({'a': Call(Name('os', 'system'), 'true')}), r'holds a os\.system'),
    (stream({'a': Name('torch.nn', 'Linear')}), r'holds a torch\.nn\.Linear'),
  ],
)
def test_mistakes_are_told(path, content, message):
  path.write_bytes(content)
  with pytest.raises(ConversionError, match=message) as e:
    torch_stream.read(path)
  assert str(path) in str(e.value)
