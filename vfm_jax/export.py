"""Write the weights of a run in the layouts that other libraries read."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save_file

from vfm_jax import convert, convert_dit, trees
from vfm_jax.convert import ConversionError
from vfm_jax.models.dit import DiT
from vfm_jax.nn import transformer
from vfm_jax.nn.adaln import Hooks
from vfm_jax.objectives.base import Objective
from vfm_jax.objectives.denoise import Denoise
from vfm_jax.objectives.masked import Masked

PyTree = Any
Format = Literal['released', 'diffusers']


def write(
  objective: Objective,
  params: PyTree,
  path: str | pathlib.Path,
  *,
  layout: Format = 'released',
) -> dict[str, np.ndarray]:
  """Write parameters under the names of a released model.

  Args:
    objective: that the parameters are of. `Denoise` with a DiT of images is
      written as DiT and SiT are released, `Masked` as VideoMAE is.
    params: the objective's, or an average of them.
    path: file of safetensors, or with `diffusers` a folder, as its
      `DiTTransformer2DModel.from_pretrained` reads it.
    layout: 'released' or 'diffusers'.

  Returns:
    The tensors that were written, float32, by name.

  Raises:
    ConversionError: the layout has no place for this objective or for some of
      its parameters.
  """
  path = pathlib.Path(path)
  if isinstance(objective, Denoise) and isinstance(objective.denoiser, DiT):
    model, params = objective.denoiser, params['denoiser']
    if layout == 'diffusers':
      config, tensors = to_diffusers(params, model)
      path.mkdir(parents=True, exist_ok=True)
      text = json.dumps(config, indent=2, sort_keys=True)
      (path / 'config.json').write_text(text + '\n')
      path = path / 'diffusion_pytorch_model.safetensors'
    else:
      tensors = convert_dit.to_dit(params, model)
  elif isinstance(objective, Masked) and layout == 'released':
    tensors = to_videomae(params, objective)
  else:
    raise ConversionError(
      f'no layout {layout!r} is known for config.objective '
      f'{type(objective).__name__}: expected Denoise with a DiT (released or '
      'diffusers) or Masked (released)'
    )
  path.parent.mkdir(parents=True, exist_ok=True)
  # What the writers of torch and diffusers note, and their readers ask for.
  save_file(tensors, path, metadata={'format': 'pt'})
  return tensors


def to_videomae(
  params: Mapping[str, PyTree], objective: Masked
) -> dict[str, np.ndarray]:
  """Return a checkpoint in the layout of a released pretraining model.

  Args:
    params: {'encoder', 'decoder'}, unrolled or scanned.
    objective: that they are of.

  Raises:
    ConversionError: the layout has no name for a parameter.
  """
  leaves = dict(trees.path_leaves(transformer.unstack_blocks(params)))
  # A name that starts so makes it a pretraining model.
  names = convert.sources(tuple(leaves), {'encoder.': np.zeros(0)})
  out = {}
  for path, source in names.items():
    x = np.asarray(leaves[path], np.float32)
    if path == 'encoder/patch_embed/kernel':
      patch = objective.encoder.patch_shape
      x = x.reshape(*patch, -1, x.shape[1]).transpose(4, 3, 0, 1, 2)
    elif path in ('encoder/pos_embed', 'decoder/mask_token'):
      x = x.reshape(1, -1, x.shape[-1])
    elif path.endswith('attn/log_scale'):
      x = x[:, None, None]
    else:
      x = convert.to_torch(path, x)
    out[source.names[0]] = np.ascontiguousarray(x)
  return out


def to_diffusers(
  params: PyTree, model: DiT
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Return the config and the tensors of a `DiTTransformer2DModel`.

  There each block has a copy of the embedders, and the position table is not
  kept. The tensors are those of the released model; diffusers spaces the
  frequencies of its time features by 1/127 where that has 1/128.

  Args:
    params: of the model, unrolled or scanned.
    model: of square images, with a null label.

  Raises:
    ConversionError: diffusers has no such model.
  """
  dims, size = model.dims, model.input_size
  if model.hooks != Hooks():
    raise ConversionError(
      'diffusers computes plain blocks: expected no `denoiser.hooks`, found '
      f'{model.hooks}'
    )
  if model.null_label is None or not model.num_classes:
    raise ConversionError(
      'diffusers has a null label in every DiT: expected '
      '`denoiser.num_classes` and `denoiser.label_dropout` above 0, found '
      f'{model.num_classes} and {model.label_dropout:g}'
    )
  if not isinstance(size, int) or model.mlp_ratio != 4:
    raise ConversionError(
      'diffusers has square images and MLPs of 4 widths: expected one number '
      'as `denoiser.input_size` and 4 as `denoiser.mlp_ratio`, found '
      f'{size} and {model.mlp_ratio:g}'
    )
  released = convert_dit.to_dit(params, model)
  del released['pos_embed']
  paths = tuple(
    p for p, _ in trees.path_leaves(transformer.unstack_blocks(params))
  )
  # A name that starts so selects the layout.
  theirs = convert_dit.sources(paths, {'transformer_blocks.': np.zeros(0)})
  tensors = {}
  for path, source in convert_dit.sources(paths, {}).items():
    names = theirs[path].names
    parts = np.split(released[source.names[0]], len(names))
    for name, part in zip(names, parts, strict=True):
      first = 'transformer_blocks.0.norm1.emb.'
      copies = dims.depth if name.startswith(first) else 1
      for i in range(copies):
        other = first.replace('0', str(i), 1)
        tensors[name.replace(first, other)] = part
  config = {
    '_class_name': 'DiTTransformer2DModel',
    'activation_fn': 'gelu-approximate',
    'attention_bias': True,
    'attention_head_dim': dims.width // dims.heads,
    'in_channels': model.channels,
    'norm_elementwise_affine': False,
    'norm_eps': model.norm_eps,
    'norm_type': 'ada_norm_zero',
    'num_attention_heads': dims.heads,
    'num_embeds_ada_norm': model.num_classes,
    'num_layers': dims.depth,
    'out_channels': model.out_channels,
    'patch_size': model.patch,
    'sample_size': size,
  }
  return config, tensors
