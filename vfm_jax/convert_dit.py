"""Convert DiT and SiT checkpoints to parameters and back, strictly both ways.

Two layouts of names are known: that of the released DiT models, which SiT,
DTR, Switch-DiT and others share, and that of a `diffusers` folder.
"""

import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vfm_jax import convert, convert_folder, convert_routing, trees
from vfm_jax.models.dit import DiT
from vfm_jax.nn import transformer
from vfm_jax.ops import positions

PyTree = Any

# Our layer, its released name, and its names in diffusers (stacked if many;
# none where diffusers has no such layer).
_BLOCK = r'transformer_blocks.\1'
_EMBED = 'transformer_blocks.0.norm1.emb'
_QKV = tuple(f'{_BLOCK}.attn1.to_{x}' for x in 'qkv')
_EXPERTS = r'blocks_(\d+)/mask_hook/experts'
_LAYERS = (
  ('patch_embed', 'x_embedder.proj', ('pos_embed.proj',)),
  (
    't_embed/fc1',
    't_embedder.mlp.0',
    (f'{_EMBED}.timestep_embedder.linear_1',),
  ),
  (
    't_embed/fc2',
    't_embedder.mlp.2',
    (f'{_EMBED}.timestep_embedder.linear_2',),
  ),
  (
    'y_embed',
    'y_embedder.embedding_table',
    (f'{_EMBED}.class_embedder.embedding_table',),
  ),
  (r'blocks_(\d+)/attn/qkv', r'blocks.\1.attn.qkv', _QKV),
  (
    r'blocks_(\d+)/attn/proj',
    r'blocks.\1.attn.proj',
    (f'{_BLOCK}.attn1.to_out.0',),
  ),
  (r'blocks_(\d+)/mlp/fc1', r'blocks.\1.mlp.fc1', (f'{_BLOCK}.ff.net.0.proj',)),
  (r'blocks_(\d+)/mlp/fc2', r'blocks.\1.mlp.fc2', (f'{_BLOCK}.ff.net.2',)),
  (
    r'blocks_(\d+)/ada',
    r'blocks.\1.adaLN_modulation.1',
    (f'{_BLOCK}.norm1.linear',),
  ),
  (r'blocks_(\d+)/mask_hook/gate', r'routers.\1.f_gate.1', ()),
  (_EXPERTS, r'routers.\1.experts', ()),
  ('final/ada', 'final_layer.adaLN_modulation.1', ('proj_out_1',)),
  ('final/linear', 'final_layer.linear', ('proj_out_2',)),
)
_SUFFIX = {'kernel': 'weight', 'table': 'weight', 'bias': 'bias'}
_EXPERT_SUFFIX = {'kernel': 'w', 'bias': 'b'}


def from_dit(
  state: convert.State,
  template: PyTree,
  *,
  model: DiT | None = None,
  ignore: Mapping[str, str] | None = None,
) -> PyTree:
  """Return the parameters of a DiT, SiT, DTR or Switch-DiT checkpoint.

  The position table of the file and those of routed models are not used, for
  they are fixed; they must be the ones that the model computes, or missing.
  diffusers keeps a copy of the embedders in each block; they must be equal.

  Args:
    state: tensors by name, in either layout.
    template: parameters of a `DiT`, or their shapes, with unrolled or scanned
      blocks.
    model: the model, where the file has tables of its routing.
    ignore: reasons by regular expression, for tensors to leave out.

  Returns:
    Float32 numpy arrays in the structure of the template.

  Raises:
    ConversionError: names each tensor that is missing, of no use, or of a
      shape or content that does not fit.
  """
  state = _without_copies(state)
  state = _without_positions(state)
  state = convert_routing.without_tables(state, model, ignore or ())
  return convert.fill(state, template, sources, ignore=ignore)


def to_dit(params: PyTree, model: DiT) -> dict[str, np.ndarray]:
  """Return a checkpoint in the released layout, with all fixed tables.

  Args:
    params: parameters of the model, unrolled or scanned; gradients and
      averages do as well.
    model: the model, of images.

  Raises:
    ConversionError: the model has parameters that the layout does not.
  """
  if model.built_grid[0] > 1 or model.tubelet > 1:
    raise convert.ConversionError(
      'the released layout holds models of images, found `denoiser.frames` '
      f'{model.frames} and `denoiser.tubelet` {model.tubelet}'
    )
  out = {'pos_embed': _table(model.built_grid[1:], model.dims.width)[None]}
  out |= convert_routing.tables(model)
  unrolled = transformer.unstack_blocks(params)
  leaves = dict(trees.path_leaves(unrolled))
  for path, source in sources(tuple(leaves), {}).items():
    x = np.asarray(leaves[path], np.float32)
    if path == 'patch_embed/kernel':
      p, c = model.patch, model.channels
      x = x.reshape(p, p, c, -1).transpose(3, 2, 0, 1)
    elif not _is_experts(path):
      x = convert.to_torch(path, x)
    out[source.names[0]] = np.ascontiguousarray(x)
  return out


def sources(
  paths: Sequence[str], state: convert.State
) -> dict[str, convert.Source]:
  """Return where each parameter comes from, by its path.

  Args:
    paths: parameter paths with unrolled blocks, such as 'blocks_0/ada/bias'.
    state: the checkpoint; only its names are looked at.

  Raises:
    ConversionError: a path is not one of an image DiT.
  """
  diffusers = any(name.startswith('transformer_blocks.') for name in state)
  out = {}
  for path in paths:
    layer, _, leaf = path.rpartition('/')
    for pattern, released, others in _LAYERS:
      match = re.fullmatch(pattern, layer)
      names = others if diffusers else (released,)
      if match and leaf in _SUFFIX and names:
        suffix = _EXPERT_SUFFIX if _is_experts(path) else _SUFFIX
        names = [f'{match.expand(n)}.{suffix[leaf]}' for n in names]
        out[path] = convert.Source(tuple(names), _conversion(layer, leaf))
        break
    else:
      raise convert.ConversionError(f'no DiT tensor is known for {path}')
  return out


def read_diffusers(
  folder: str | pathlib.Path,
) -> tuple[DiT, dict[str, np.ndarray]]:
  """Read the model and the tensors of a DiT that `diffusers` saved.

  The tensors are for our model, which is the released one: diffusers computes
  slightly other time features and norms from them.

  Args:
    folder: of the transformer, with `config.json` and
      `diffusion_pytorch_model.safetensors` (or `.bin`), or
      of a pipeline that has it as `transformer`.

  Raises:
    ConversionError: a file is missing, or the config is of another model.
  """
  found = convert_folder.find(
    folder,
    'transformer',
    {'norm_type': 'ada_norm_zero', 'activation_fn': 'gelu-approximate'},
  )
  config = found.config
  channels = config['in_channels']
  model = DiT(
    width=config['num_attention_heads'] * config['attention_head_dim'],
    depth=config['num_layers'],
    heads=config['num_attention_heads'],
    patch=config['patch_size'],
    input_size=config['sample_size'],
    channels=channels,
    learn_sigma=(config.get('out_channels') or channels) == 2 * channels,
    num_classes=config['num_embeds_ada_norm'],
  )
  return model, convert.read_checkpoint(found.weights)


def _is_experts(path):
  """Say whether a parameter is of experts: [E, in, out] and [E, out]."""
  return re.match(f'{_EXPERTS}/', path) is not None


def _conversion(layer, leaf):
  if layer == 'patch_embed' and leaf == 'kernel':
    return _patches
  if layer.endswith('qkv'):
    return convert.qkv_kernel if leaf == 'kernel' else convert.qkv_bias
  if leaf == 'kernel' and not _is_experts(f'{layer}/'):
    return convert.transpose
  return lambda x, shape: x


def _patches(x, shape):
  # (out, in, row, column) to patches in the order (row column in).
  del shape
  return x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])


def _table(grid, width):
  return positions.sincos_2d(grid, width, first='w').astype(np.float32)


def _without_positions(state):
  """Check the position table of a checkpoint and leave it out."""
  out = dict(state)
  for name in ('pos_embed', 'pos_embed.pos_embed'):
    table = out.pop(name, None)
    if table is None:
      continue
    side = math.isqrt(table.shape[1]) if table.ndim == 3 else 0
    # Averaging over training moves a fixed table by roundings only.
    if table.shape[:2] != (1, side**2) or not np.allclose(
      table[0], _table((side, side), table.shape[2]), atol=1e-3
    ):
      raise convert.ConversionError(
        f'expected {name} to be the fixed table of a square grid, [1, N, D], '
        f'found another one of shape {table.shape}'
      )
  return out


def _without_copies(state):
  """Leave out the embedders of all blocks but the first."""
  out = {}
  for name, tensor in state.items():
    first = re.sub(
      r'^transformer_blocks\.\d+\.norm1\.emb\.', f'{_EMBED}.', name
    )
    if first != name and first in state:
      if not np.array_equal(tensor, state[first]):
        raise convert.ConversionError(
          f'{name} is not equal to {first}: only one embedder is kept'
        )
      continue
    out[name] = tensor
  return out
