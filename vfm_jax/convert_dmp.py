"""Convert DMP checkpoints to parameters and back, strictly both ways.

The released layout is that of DiT (`convert_dit`) with prompts [depth, n, D]
of the first blocks, a gate [n, D + 1] whose last column is that of the layer's
number, and the weights [D, n] of its noise.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from vfm_jax import convert, convert_dit, trees
from vfm_jax.models.dit import DiT
from vfm_jax.models.prompts import Prompts
from vfm_jax.nn import adaln, transformer

PyTree = Any

_PROMPTS = 'prompt_embeddings'
_GATE = {
  'prepare_hook/gate/kernel': ('gate.weight', lambda x, shape: x[:, :-1].T),
  'prepare_hook/gate/bias': ('gate.bias', lambda x, shape: x),
  'prepare_hook/depth_scale': ('gate.weight', lambda x, shape: x[:, -1]),
  'prepare_hook/noise/kernel': ('w_noise', lambda x, shape: x),
}
_NAMES = {_PROMPTS, *(name for name, _ in _GATE.values())}


def patched(model: DiT) -> bool:
  """Say whether a model has prompts."""
  return isinstance(model.hooks.token, Prompts)


def from_dmp(
  state: convert.State,
  template: PyTree,
  model: DiT,
  *,
  ignore: Mapping[str, str] | None = None,
) -> PyTree:
  """Return the parameters of a DMP checkpoint.

  Args:
    state: tensors by name.
    template: parameters of the model, or their shapes, with unrolled or
      scanned blocks.
    model: with the hooks of `models.prompts.dmp`. Prompts of blocks after its
      `depth`, which the file does not have and nothing reads, are zeros.
    ignore: reasons by regular expression, for tensors to leave out.

  Returns:
    Float32 numpy arrays in the structure of the template.

  Raises:
    ConversionError: names each tensor of the prompts and the gate, or else of
      the network, that is missing, of no use or of a shape that does not fit.
  """
  depth = _depth(model)
  if _PROMPTS in state and len(state[_PROMPTS]) != depth:
    raise convert.ConversionError(
      f'expected {_PROMPTS} of {depth} blocks (`denoiser.hooks.depth`), found '
      f'{len(state[_PROMPTS])}'
    )
  leaves = traverse_util.flatten_dict(template, sep='/')
  ours = {path: x for path, x in leaves.items() if _is_patch(path)}
  rest = {path: x for path, x in leaves.items() if path not in ours}
  patch = convert.fill(
    {k: x for k, x in state.items() if k in _NAMES},
    traverse_util.unflatten_dict(ours, sep='/'),
    functools.partial(_sources, depth),
    ignore=ignore,
  )
  network = convert_dit.from_dit(
    {k: x for k, x in state.items() if k not in _NAMES},
    traverse_util.unflatten_dict(rest, sep='/'),
    model=model,
    ignore=ignore,
  )
  filled = dict(trees.path_leaves(patch)) | dict(trees.path_leaves(network))
  return traverse_util.unflatten_dict(filled, sep='/')


def to_dmp(params: PyTree, model: DiT) -> dict[str, np.ndarray]:
  """Return a checkpoint in the released layout, with the position table.

  Args:
    params: parameters of the model, unrolled or scanned; gradients and
      averages do as well.
    model: with the hooks of `models.prompts.dmp`.

  Raises:
    ConversionError: the model has parameters that the layout does not.
  """
  depth = _depth(model)
  unrolled = transformer.unstack_blocks(params)
  leaves = dict(trees.path_leaves(unrolled))
  rest = {path: x for path, x in leaves.items() if not _is_patch(path)}
  out = convert_dit.to_dit(
    traverse_util.unflatten_dict(rest, sep='/'),
    model.clone(hooks=adaln.Hooks(mask=model.hooks.mask)),
  )
  get = lambda path: np.asarray(leaves[path], np.float32)  # noqa: E731
  out[_PROMPTS] = np.stack(
    [get(f'blocks_{i}/token_hook/prompt_tokens') for i in range(depth)]
  )
  if 'prepare_hook/depth_scale' in leaves:
    columns = [
      get('prepare_hook/gate/kernel').T,
      get('prepare_hook/depth_scale')[:, None],
    ]
    out['gate.weight'] = np.concatenate(columns, 1)
    out['gate.bias'] = get('prepare_hook/gate/bias')
    out['w_noise'] = get('prepare_hook/noise/kernel')
  return out


def _sources(
  depth: int, paths: Sequence[str], state: convert.State
) -> dict[str, convert.Source]:
  """Return where the parameters of prompts and gate come from."""
  del state
  out = {}
  for path in paths:
    block = re.fullmatch(r'blocks_(\d+)/token_hook/prompt_tokens', path)
    if block is not None:
      cut = functools.partial(_prompts_of, int(block[1]), depth)
      out[path] = convert.Source((_PROMPTS,), cut)
    elif path in _GATE:
      name, cut = _GATE[path]
      out[path] = convert.Source((name,), cut)
    else:
      raise convert.ConversionError(f'no DMP tensor is known for {path}')
  return out


def _prompts_of(i, depth, x, shape):
  if x.shape != (depth, *shape):
    raise ValueError
  return x[i] if i < depth else np.zeros(shape, np.float32)


def _is_patch(path):
  return path.startswith('prepare_hook/') or '/token_hook/' in path


def _depth(model):
  if not patched(model):
    raise convert.ConversionError(
      'expected a model with prompts, `denoiser.hooks` from `prompts.dmp`, '
      f'found {model.hooks}'
    )
  return model.hooks.token.depth or model.dims.depth
