"""Convert the networks that metrics read, strictly both ways."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vfm_jax import convert

PyTree = Any

_NORM = {
  'scale': 'weight',
  'bias': 'bias',
  'mean': 'running_mean',
  'var': 'running_var',
}
_COUNTERS = {r'.*\.num_batches_tracked': 'counts training steps'}
_INCEPTION_IGNORED = {
  **_COUNTERS,
  r'fc\.bias': 'the evaluator reads logits without a bias',
}
_EFFICIENTNET_IGNORED = {
  **_COUNTERS,
  r'_fc\.(weight|bias)': 'features are read before the classifier',
}
# Names in the blocks of EfficientNet: layer and its norm. The first norm is
# that of the expansion, also where there is none.
_BLOCK = {
  'expand': ('_expand_conv', '_bn0'),
  'depthwise': ('_depthwise_conv', '_bn1'),
  'project': ('_project_conv', '_bn2'),
}
_ENDS = {'stem': ('_conv_stem', '_bn0'), 'head': ('_conv_head', '_bn1')}


def from_inception(state: convert.State, template: PyTree) -> PyTree:
  """Return the parameters of `InceptionV3` from the port of pytorch-fid.

  Args:
    state: tensors of `pt_inception-2015-12-05` by name.
    template: parameters, or their shapes.

  Raises:
    ConversionError: names each tensor that is missing, of no use, or of a
      shape that does not fit.
  """
  return convert.fill(
    state, template, _inception_sources, ignore=_INCEPTION_IGNORED
  )


def from_efficientnet(state: convert.State, template: PyTree) -> PyTree:
  """Return the parameters of `EfficientNetLite0`.

  Args:
    state: tensors by name, in the layout of efficientnet_lite_pytorch.
    template: parameters, or their shapes.

  Raises:
    ConversionError: as `from_inception`.
  """
  return convert.fill(
    state, template, _efficientnet_sources, ignore=_EFFICIENTNET_IGNORED
  )


def _inception_sources(
  paths: Sequence[str], state: convert.State
) -> Mapping[str, convert.Source]:
  del state
  out = {'fc/kernel': convert.Source(('fc.weight',), convert.transpose)}
  for path in paths:
    if path in out:
      continue
    layer, _, part = path.rpartition('/')
    name = layer.replace('/', '.')
    if part == 'kernel':
      out[path] = _kernel(f'{name}.conv')
    else:
      out[path] = _norm(f'{name.removesuffix(".norm")}.bn', part)
  return out


def _efficientnet_sources(
  paths: Sequence[str], state: convert.State
) -> Mapping[str, convert.Source]:
  del state
  out = {}
  for path in paths:
    match = re.fullmatch(r'blocks_(\d+)/(.*)', path)
    layer, _, rest = (match[2] if match else path).partition('/')
    prefix = f'_blocks.{match[1]}.' if match else ''
    kernel, norm = (_BLOCK if match else _ENDS)[layer]
    if rest.startswith('norm/'):
      out[path] = _norm(f'{prefix}{norm}', rest.removeprefix('norm/'))
    else:
      out[path] = _kernel(f'{prefix}{kernel}')
  return out


def _kernel(name: str) -> convert.Source:
  return convert.Source((f'{name}.weight',), _convolution)


def _norm(name: str, part: str) -> convert.Source:
  return convert.Source((f'{name}.{_NORM[part]}',), _same)


def _convolution(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Return (out, in, h, w) as [h, w, in, out]; depthwise, as [h, w, out]."""
  x = x.transpose(2, 3, 1, 0)
  return x[:, :, 0] if len(shape) == 3 else x


def _same(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  del shape
  return x
