"""Read what torch itself saves."""

import argparse

import numpy as np
import pytest

from vfm_jax import convert, torch_files

pytestmark = pytest.mark.parity


@pytest.mark.parametrize(
  'name',
  ['float16', 'bfloat16', 'float32', 'float64', 'int64', 'int32', 'bool'],
)
def test_types_and_views(tmp_path, name):
  torch = pytest.importorskip('torch')
  whole = (torch.randn(4, 6) * 3).to(getattr(torch, name))
  saved = {
    'whole': whole,
    'transposed': whole.T,
    'part': whole[1:3, ::2],
    'expanded': whole[:1].expand(3, 6),
    'scalar': whole[2, 3],
    'empty': whole[:0],
    'parameter': torch.nn.Parameter(whole, requires_grad=False),
  }
  torch.save(saved, tmp_path / 'x.pt')
  read = torch_files.read(tmp_path / 'x.pt')
  for key, tensor in saved.items():
    got, want = read[key].read(), tensor
    if name == 'bfloat16':
      got, want = got.astype(np.float32), tensor.float()
    assert str(read[key].dtype) == name
    np.testing.assert_array_equal(got, want.numpy())
  assert len({id(t.storage) for t in read.values()}) == 1  # one is tied to all


def test_a_trainer_s_checkpoint(tmp_path):
  torch = pytest.importorskip('torch')
  model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
  average = {f'module.{k}': v + 1 for k, v in model.state_dict().items()}
  optimizer = torch.optim.AdamW(model.parameters())
  model(torch.randn(5, 3)).sum().backward()
  optimizer.step()
  saved = {
    'model': model.state_dict(),
    'ema': average,
    'opt': optimizer.state_dict(),
    'args': argparse.Namespace(lr=1e-4, sizes=[1, 2], name=None),
  }
  torch.save(saved, tmp_path / 'x.pt')
  assert torch_files.read(tmp_path / 'x.pt')['args'] == saved['args']
  for entry in ('model', 'ema'):
    found, got = convert.read_entry(tmp_path / 'x.pt', entry=entry)
    assert found == entry
    want = {k.removeprefix('module.'): v for k, v in saved[entry].items()}
    assert got.keys() == want.keys()
    for key, tensor in want.items():
      np.testing.assert_array_equal(got[key], tensor.numpy())


def test_whole_modules_are_refused(tmp_path):
  torch = pytest.importorskip('torch')
  torch.save(torch.nn.Linear(2, 2), tmp_path / 'x.pt')
  with pytest.raises(convert.ConversionError, match='not loaded: expected'):
    torch_files.read(tmp_path / 'x.pt')
