"""Convert autoencoders that `diffusers` saved to parameters and back.

Over time diffusers wrote the attention layers under two sets of names, and as
matrices or as 1x1 convolutions; all are read, and the newer ones written.
"""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vfm_jax import convert, convert_folder, trees
from vfm_jax.convert import ConversionError
from vfm_jax.data.shards import sha256
from vfm_jax.models.autoencoder import AutoencoderKL

PyTree = Any

_ATTENTION = {
  'norm': 'group_norm',
  'q': 'to_q',
  'k': 'to_k',
  'v': 'to_v',
  'proj': 'to_out.0',
}
_OLDER = {
  'to_q': 'query',
  'to_k': 'key',
  'to_v': 'value',
  'to_out.0': 'proj_attn',
}
# Our layer and its name in diffusers.
_SIDE = '(encoder|decoder)'
_LAYERS = (
  (rf'{_SIDE}/conv_(in|out)', r'\1.conv_\2'),
  (rf'{_SIDE}/norm_out', r'\1.conv_norm_out'),
  (
    r'(encoder|decoder)/(down|up)_(\d+)_(\d+)/(norm.|conv.)',
    r'\1.\2_blocks.\3.resnets.\4.\5',
  ),
  (
    r'(encoder|decoder)/(down|up)_(\d+)_(\d+)/shortcut',
    r'\1.\2_blocks.\3.resnets.\4.conv_shortcut',
  ),
  (r'encoder/shrink_(\d+)', r'encoder.down_blocks.\1.downsamplers.0.conv'),
  (r'decoder/grow_(\d+)', r'decoder.up_blocks.\1.upsamplers.0.conv'),
  (
    rf'{_SIDE}/mid/res_(\d)/(norm.|conv.)',
    r'\1.mid_block.resnets.\2.\3',
  ),
  *(
    (rf'{_SIDE}/mid/attn/{ours}', rf'\1.mid_block.attentions.0.{theirs}')
    for ours, theirs in _ATTENTION.items()
  ),
  (r'((?:post_)?quant_conv)', r'\1'),
)
_SUFFIX = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias'}


class Autoencoder(NamedTuple):
  """Hold a frozen autoencoder.

  Attributes:
    model: the module.
    params: its parameters, float32 numpy.
    sha256: hash of the file that they come from.
  """

  model: AutoencoderKL
  params: PyTree
  sha256: str


def load(
  folder: str | pathlib.Path,
  *,
  ignore: Mapping[str, str] | None = None,
  **fields: Any,
) -> Autoencoder:
  """Read an autoencoder from a folder that `diffusers` saved.

  Args:
    folder: of the autoencoder, with `config.json` and
      `diffusion_pytorch_model.safetensors` (or `.bin`), or
      of a pipeline that has it as `vae`.
    ignore: reasons by regular expression, for tensors to leave out.
    **fields: of `AutoencoderKL` to replace, such as `dtype`.

  Raises:
    ConversionError: a file is missing, the config is of another model, or the
      tensors don't fit it.
  """
  found = convert_folder.find(
    folder,
    'vae',
    {
      '_class_name': 'AutoencoderKL',
      'act_fn': 'silu',
      'latents_mean': None,
      'latents_std': None,
    },
  )
  model = _model(found).clone(**fields)
  state = convert.read_checkpoint(found.weights)
  params = from_vae(state, model, ignore=ignore)
  return Autoencoder(model, params, sha256(found.weights))


def from_vae(
  state: convert.State,
  model: AutoencoderKL,
  *,
  ignore: Mapping[str, str] | None = None,
) -> PyTree:
  """Return the parameters of a checkpoint under the names of diffusers.

  Args:
    state: tensors by name, with either set of names of the attention layers.
    model: that they are for.
    ignore: reasons by regular expression, for tensors to leave out.

  Returns:
    Float32 numpy arrays.

  Raises:
    ConversionError: names each tensor that is missing, of no use, or of a
      shape that does not fit.
  """
  return convert.fill(state, model.template(), sources, ignore=ignore)


def to_vae(params: PyTree) -> dict[str, np.ndarray]:
  """Return a checkpoint under the names of diffusers.

  Raises:
    ConversionError: the parameters are not those of an autoencoder.
  """
  leaves = dict(trees.path_leaves(params))
  out = {}
  for path, source in sources(tuple(leaves), {}).items():
    x = np.asarray(leaves[path], np.float32)
    if x.ndim == 4:
      x = x.transpose(3, 2, 0, 1)
    out[source.names[0]] = np.ascontiguousarray(x.T if x.ndim == 2 else x)
  return out


def sources(
  paths: Sequence[str], state: convert.State
) -> dict[str, convert.Source]:
  """Return where each parameter comes from, by its path.

  Args:
    paths: parameter paths, such as 'encoder/down_0_1/conv1/kernel'.
    state: the checkpoint; only its names are looked at.

  Raises:
    ConversionError: a path is not one of an autoencoder.
  """
  out = {}
  for path in paths:
    layer, _, leaf = path.rpartition('/')
    for pattern, theirs in _LAYERS:
      match = re.fullmatch(pattern, layer)
      if match and leaf in _SUFFIX:
        name = f'{match.expand(theirs)}.{_SUFFIX[leaf]}'
        out[path] = convert.Source((_present(name, state),), _convert)
        break
    else:
      raise ConversionError(f'no autoencoder tensor is known for {path}')
  return out


def _model(found: convert_folder.Folder) -> AutoencoderKL:
  """Return the module that a config describes."""
  config = found.config
  levels = len(config['block_out_channels'])
  for key, kind in (
    ('down_block_types', 'DownEncoderBlock2D'),
    ('up_block_types', 'UpDecoderBlock2D'),
  ):
    if list(config[key]) != [kind] * levels:
      raise ConversionError(
        f'expected {key} {kind!r} {levels} times in {found.path}/config.json, '
        f'found {config[key]}'
      )
  if config['in_channels'] != config['out_channels']:
    raise ConversionError(
      f'expected as many out_channels as in_channels in {found.path}'
      f'/config.json, found {config["out_channels"]} and '
      f'{config["in_channels"]}'
    )
  return AutoencoderKL(
    widths=tuple(config['block_out_channels']),
    layers=config['layers_per_block'],
    groups=config['norm_num_groups'],
    channels=config['in_channels'],
    latent_channels=config['latent_channels'],
    # Configs from before these keys are of models that have all three.
    mid_attention=config.get('mid_block_add_attention', True),
    quant=config.get('use_quant_conv', True),
    post_quant=config.get('use_post_quant_conv', True),
    scaling=config.get('scaling_factor', 0.18215),
    shift=config.get('shift_factor') or 0.0,
  )


def _present(name: str, state: convert.State) -> str:
  """Return the name, or the older one where the checkpoint has that."""
  for newer, older in _OLDER.items():
    renamed = name.replace(f'.{newer}.', f'.{older}.')
    if renamed in state and name not in state:
      return renamed
  return name


def _convert(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  if len(shape) == 4:  # (out, in, row, column)
    return x.transpose(2, 3, 1, 0)
  if len(shape) == 2 and x.shape[2:] == (1, 1):
    x = x[:, :, 0, 0]
  return x.T
