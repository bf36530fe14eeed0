"""Check the reader of torch files on archives that are made by hand."""

import argparse
import io
import pickle
import struct
import sys
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax import convert, torch_files
from vfm_jax.torch_files import ConversionError

COUNT = np.arange(12, dtype=np.float32)


class Code(bytes):
  """Opcodes of a pickle that leave one value on the stack."""


def encode(value):
  """Return the opcodes of a value: what torch's pickles are made of."""
  match value:
    case Code():
      return value
    case bool():
      return b'\x88' if value else b'\x89'
    case int():
      return b'J' + struct.pack('<i', value)
    case str():
      return b'X' + struct.pack('<I', len(value)) + value.encode()
    case tuple():
      return b'(' + b''.join(map(encode, value)) + b't'
    case dict():
      items = (encode(x) for pair in value.items() for x in pair)
      return b'}(' + b''.join(items) + b'u'
    case np.ndarray():
      raise TypeError('a tensor is made by `tensor`')


def call(module, name, *args):
  return Code(f'c{module}\n{name}\n'.encode() + encode(args) + b'R')


def storage(key='0', kind='FloatStorage', size=12):
  kind = Code(f'ctorch\n{kind}\n'.encode())
  return Code(encode(('storage', kind, key, 'cpu', size)) + b'Q')


def tensor(shape, strides, offset=0, **kwargs):
  hooks = call('collections', 'OrderedDict')
  return call(
    'torch._utils',
    '_rebuild_tensor_v2',
    *(storage(**kwargs), offset, shape, strides, False, hooks),
  )


def write(path, value, storages=None, order='little', name='x'):
  storages = {'0': COUNT} if storages is None else storages
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr(f'{name}/data.pkl', b'\x80\x02' + encode(value) + b'.')
    archive.writestr(f'{name}/byteorder', order)
    for key, array in storages.items():
      archive.writestr(f'{name}/data/{key}', array.tobytes())
  return path


def test_views_ties_and_parameters(tmp_path):
  whole = tensor((3, 4), (4, 1))
  saved = {
    'whole': whole,
    'transposed': tensor((4, 3), (1, 4)),
    'part': tensor((2,), (5,), offset=6),
    'repeated': tensor((2, 2), (0, 1), offset=3),
    'scalar': tensor((), (), offset=5),
    'empty': tensor((0, 4), (4, 1)),
    'parameter': call(
      *('torch._utils', '_rebuild_parameter', whole, True),
      call('collections', 'OrderedDict'),
    ),
  }
  read = torch_files.read(write(tmp_path / 'x.pt', saved))
  matrix = COUNT.reshape(3, 4)
  for name, want in {
    'whole': matrix,
    'transposed': matrix.T,
    'part': COUNT[[6, 11]],
    'repeated': np.stack([COUNT[3:5]] * 2),
    'scalar': COUNT[5],
    'empty': np.zeros((0, 4)),
    'parameter': matrix,
  }.items():
    assert read[name].shape == want.shape
    np.testing.assert_array_equal(read[name].read(), want)
  assert len({id(t.storage) for t in read.values()}) == 1


@pytest.mark.parametrize('order', ['little', 'big'])
@pytest.mark.parametrize(
  ('kind', 'dtype'),
  [
    ('HalfStorage', np.float16),
    ('BFloat16Storage', jnp.bfloat16),
    ('DoubleStorage', np.float64),
    ('LongStorage', np.int64),
    ('BoolStorage', np.bool_),
  ],
)
def test_types(tmp_path, kind, dtype, order):
  values = (COUNT % 2).astype(dtype)
  raw = values.view(f'u{values.itemsize}')
  raw = raw.byteswap() if order != sys.byteorder else raw
  path = tmp_path / 'x.pt'
  write(path, tensor((12,), (1,), kind=kind), {'0': raw}, order)
  got = torch_files.read(path)
  assert got.dtype == dtype
  assert got.read().dtype == dtype
  np.testing.assert_array_equal(got.read(), values)


def test_the_average_of_an_encoder_comes_before_the_encoder(tmp_path):
  """V-JEPA's files hold both, and wrap the names twice."""
  name = 'module.backbone.norm.weight'
  saved = {
    'encoder': {name: tensor((2,), (1,))},
    'target_encoder': {name: tensor((2,), (1,), 4)},
    'epoch': 3,
  }
  path = tmp_path / 'vitl16.pth.tar'
  write(path, saved)
  entry, state = convert.read_entry(path)
  assert entry == 'target_encoder'
  np.testing.assert_array_equal(state['norm.weight'], COUNT[4:6])
  bare = {name: tensor((2,), (1,)), 'norm.weight': tensor((2,), (1,))}
  write(path, {'encoder': bare})
  with pytest.raises(ConversionError, match=r'one tensor for norm\.weight'):
    convert.read_entry(path)


def test_an_entry_with_the_command_line_beside_it(tmp_path):
  options = call('argparse', 'Namespace')
  options = Code(options + encode({'lr': 1}) + b'b')
  saved = {
    'model': {'a.weight': tensor((2,), (1,))},
    'ema': {'module.a.weight': tensor((2,), (1,), offset=2)},
    'args': options,
  }
  path = write(tmp_path / 'x.pt', saved)
  assert torch_files.read(path)['args'] == argparse.Namespace(lr=1)
  for entry, used, want in (
    (None, 'model', [0, 1]),
    ('model', 'model', [0, 1]),
    ('ema', 'ema', [2, 3]),
  ):
    found, got = convert.read_entry(path, entry=entry)
    assert found == used
    np.testing.assert_array_equal(got['a.weight'], want)
  with pytest.raises(ValueError, match=r"'delta' in x\.pt, found \['args'"):
    convert.read_entry(path, entry='delta')
  with pytest.raises(ConversionError, match=r"entry 'args', found a Namespace"):
    convert.read_entry(path, entry='args')
  write(path, {'opt': {}, 'step': 3, 'params': saved['model']})
  with pytest.raises(ConversionError, match=r"under \['opt', 'step'.*--entry"):
    convert.read_entry(path)
  write(path, tensor((2,), (1,)))
  with pytest.raises(ConversionError, match='a dict of tensors, found a Tens'):
    convert.read_entry(path)


@pytest.mark.parametrize(
  ('module', 'name'),
  [
    ('os', 'system'),
    ('builtins', 'eval'),
    ('collections', 'defaultdict'),
    ('torch', 'load'),
    ('vfm_jax.torch_files', 'read'),
  ],
)
def test_nothing_else_is_named(tmp_path, module, name):
  path = write(tmp_path / 'x.pt', {'a': call(module, name, 'true')})
  with pytest.raises(ConversionError, match=rf'x\.pt: it holds a {module}\.'):
    torch_files.read(path)


def test_foreign_and_damaged_files(tmp_path):
  path = tmp_path / 'x.pt'
  good = write(path, tensor((3, 4), (4, 1))).read_bytes()

  def refused(pattern):
    with pytest.raises(ConversionError, match=rf'x\.pt: {pattern}'):
      torch_files.read(path).read()

  for content in (good[:-40], good[: len(good) // 2], b'', b'foreign' * 99):
    path.write_bytes(content)
    refused('cut off, or not in the zip format')
  at = good.index(COUNT.tobytes())
  path.write_bytes(good[:at] + b'\xff' + good[at + 1 :])
  refused('cut off.*CRC')
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('weights.txt', 'none')
  refused(r"expected the entry data\.pkl .*\['weights\.txt'\]")
  write(path, tensor((3, 4), (4, 1)), {})
  refused('expected an entry data/0, found none')
  write(path, tensor((3, 4), (4, 1)), {'0': COUNT[:5]})
  refused('expected 48 bytes in data/0, found 20')
  for shape, strides, offset in (
    ((3, 5), (4, 1), 0),
    ((12,), (1,), 1),
    ((2,), (-1,), 4),
    ((2, 3), (1,), 0),
  ):
    write(path, tensor(shape, strides, offset))
    refused('.*storage 0|the pickle in it is damaged')
  for code in (b'', b'garbage', b'(', encode('x')[:-1], b'0'):
    write(path, Code(code))
    refused('the pickle in it is damaged')
  out = io.BytesIO()
  pickle.dump({'a': 1}, out)
  path.write_bytes(out.getvalue())
  refused('cut off, or not in the zip format')
