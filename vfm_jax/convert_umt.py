"""Convert CLIP's image tower and the students of UMT, strictly both ways.

The image tower comes under the names of its release, by itself or beside the
text tower, with patches of one frame or without a frame axis, and under those
of `transformers`. Students come as UMT pretrains and as it fine-tunes them.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from vfm_jax import convert
from vfm_jax.convert import ConversionError, Source
from vfm_jax.models.encoders import VideoViT
from vfm_jax.ops import positions as pos

PyTree = Any

# Largest difference of a table in a file from the one that we compute.
_TABLE_ATOL = 1e-3

_TEXT = {
  r'(transformer|token_embedding|ln_final|text_model)\..*': 'the text tower',
  r'positional_embedding|text_projection(\.weight)?': 'the text tower',
  'logit_scale|input_resolution|context_length|vocab_size': 'of both towers',
}
_BUFFERS = {r'.*\.position_ids': 'counts from 0'}
_HEADS = {r'clip_decoder\..*': 'the template has no heads of the distillation'}
_TABLE = {r'(encoder\.)?pos_embed': 'computed, and compared with what we do'}


def from_clip(
  state: convert.State,
  template: PyTree,
  *,
  ignore: Mapping[str, str] | None = None,
) -> PyTree:
  """Return the parameters of a `ClipViT`.

  Args:
    state: tensors by name, of the image tower or of both.
    template: parameters, or their shapes, with unrolled or scanned blocks.
    ignore: reasons by regular expression, for further tensors to leave out.

  Returns:
    Float32 numpy arrays in the structure of the template.

  Raises:
    ConversionError: names each tensor that is missing, of no use, or of a
      shape that does not fit.
  """
  ignored = {**_BUFFERS, **(ignore or {})}
  if any(name.startswith(('visual.', 'vision_model.')) for name in state):
    ignored |= _TEXT
  return convert.fill(state, template, _clip_sources, ignore=ignored)


def from_umt(
  state: convert.State,
  template: PyTree,
  *,
  encoder: VideoViT,
  ignore: Mapping[str, str] | None = None,
) -> PyTree:
  """Return the parameters of a student of UMT.

  Args:
    state: tensors by name, of a pretrained or fine-tuned model.
    template: parameters, or their shapes: {'encoder': ..., 'heads': ...} as
      `Distill` has them, or {'encoder': ...}, for which the heads of the
      distillation are left out.
    encoder: that the template is of. A position table in the file has to be
      the one that it computes; with learned positions it is taken as it is.
    ignore: reasons by regular expression, for further tensors to leave out.

  Returns:
    Float32 numpy arrays in the structure of the template.

  Raises:
    ConversionError: as `from_clip`; or the position table is another one.
  """
  ignored = dict(ignore or {})
  if 'heads' not in template:
    ignored |= _HEADS
  if encoder.positions == 'flat_sinusoid':
    _check_table(state, encoder)
    ignored |= _TABLE
  return convert.fill(state, template, sources, ignore=ignored)


def sources(paths: Sequence[str], state: convert.State) -> dict[str, Source]:
  """Return where each parameter of a student comes from, by its path.

  Args:
    paths: parameter paths with unrolled blocks, such as 'heads/norm_0/bias'.
    state: the checkpoint; only its names are looked at.

  Raises:
    ConversionError: a path is not one of a student.
  """
  heads = [path for path in paths if path.startswith('heads/')]
  out = convert.sources([p for p in paths if p not in heads], state)
  for path in heads:
    match = re.fullmatch(r'heads/(head|norm)_(\d+)/(kernel|scale|bias)', path)
    if match is None:
      raise ConversionError(f'no tensor of UMT is known for {path}')
    part = 'bias' if match[3] == 'bias' else 'weight'
    name = f'clip_decoder.{match[2]}.{match[1]}.{part}'
    out[path] = Source((name,), convert.transpose)
  return out


def _check_table(state, encoder):
  """Refuse a position table that is not the one of the encoder."""
  for name in ('pos_embed', 'encoder.pos_embed'):
    if name not in state:
      continue
    found = np.asarray(state[name], np.float32)
    if not any(_equal(found, t) for t in _tables(encoder, found.shape[-2])):
      raise ConversionError(
        f'{name} {found.shape} is none of the tables that the encoder computes '
        'for as many tokens; change `encoder.positions`, `frames`, '
        '`image_size` or `resample` (UMT interpolates that of 8 frames of 14 x '
        "14 tokens, 'bicubic'), or take the table with positions 'learned' "
        'and `train_positions` False'
      )


def _equal(x, y):
  x = x.reshape(-1, x.shape[-1])
  return x.shape == y.shape and np.allclose(x, y, rtol=0, atol=_TABLE_ATOL)


def _tables(encoder, rows) -> Iterator[np.ndarray]:
  """Yield the encoder's tables for all clips of so many tokens."""
  built = encoder.built_grid
  table = pos.fixed_table('flat_sinusoid', encoder.dims.width, built)
  if rows == len(table):
    yield table
  for side in range(1, math.isqrt(rows) + 1):
    if rows % side**2 == 0:
      grid = (rows // side**2, side, side)
      yield np.asarray(
        pos.interpolate(jnp.asarray(table), built, grid, encoder.resample)
      )


def _clip_sources(
  paths: Sequence[str], state: convert.State
) -> dict[str, Source]:
  """Return where each parameter of a `ClipViT` comes from, by its path."""
  hugging = any('pre_layrnorm' in name for name in state)
  prefix = 'visual.' if any(n.startswith('visual.') for n in state) else ''
  if hugging:
    nested = any(n.startswith('vision_model.') for n in state)
    prefix = 'vision_model.' if nested else ''
  rules = _TRANSFORMERS if hugging else _RELEASED
  out = {}
  for path in paths:
    for pattern, names, fit in rules:
      match = re.fullmatch(pattern, path)
      if match is None:
        continue
      names = [match.expand(n).replace('<vision>', prefix) for n in names]
      out[path] = Source(tuple(names), fit)
      break
    else:
      raise ConversionError(f'no tensor of CLIP is known for {path}')
  return out


def _same(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  del shape
  return x


def _convolution(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Return (out, in, h, w), or (out, in, 1, h, w), as patches (h w in)."""
  del shape
  x = x[:, :, 0] if x.ndim == 5 and x.shape[2] == 1 else x
  return x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])


def _affine(path, name):
  return [
    (rf'{path}/(?:scale|kernel)', [f'{name}.weight'], convert.transpose),
    (rf'{path}/bias', [f'{name}.bias'], _same),
  ]


def _released_rules():
  block, name = r'blocks_(\d+)', r'<vision>transformer.resblocks.\1'
  rules = [
    ('cls_token', ['<vision>class_embedding'], _same),
    ('pos_embed', ['<vision>positional_embedding'], _same),
    ('patch_embed/kernel', ['<vision>conv1.weight'], _convolution),
    ('proj/kernel', ['<vision>proj'], _same),
    *_affine('norm_pre', '<vision>ln_pre'),
    *_affine('norm_post', '<vision>ln_post'),
    (
      rf'{block}/attn/qkv/kernel',
      [f'{name}.attn.in_proj_weight'],
      convert.qkv_kernel,
    ),
    (f'{block}/attn/qkv/bias', [f'{name}.attn.in_proj_bias'], convert.qkv_bias),
  ]
  for path, layer in (
    ('attn/proj', 'attn.out_proj'),
    ('norm1', 'ln_1'),
    ('norm2', 'ln_2'),
    ('mlp/fc1', 'mlp.c_fc'),
    ('mlp/fc2', 'mlp.c_proj'),
  ):
    rules += _affine(f'{block}/{path}', f'{name}.{layer}')
  return tuple(rules)


def _transformers_rules():
  block, name = r'blocks_(\d+)', r'<vision>encoder.layers.\1'
  ends = '<vision>embeddings'
  qkv = [f'{name}.self_attn.{x}_proj' for x in 'qkv']
  rules = [
    ('cls_token', [f'{ends}.class_embedding'], _same),
    ('pos_embed', [f'{ends}.position_embedding.weight'], _same),
    ('patch_embed/kernel', [f'{ends}.patch_embedding.weight'], _convolution),
    ('proj/kernel', ['visual_projection.weight'], convert.transpose),
    # So `transformers` spells it.
    *_affine('norm_pre', '<vision>pre_layrnorm'),
    *_affine('norm_post', '<vision>post_layernorm'),
    (
      f'{block}/attn/qkv/kernel',
      [f'{x}.weight' for x in qkv],
      convert.qkv_kernel,
    ),
    (f'{block}/attn/qkv/bias', [f'{x}.bias' for x in qkv], convert.qkv_bias),
  ]
  for path, layer in (
    ('attn/proj', 'self_attn.out_proj'),
    ('norm1', 'layer_norm1'),
    ('norm2', 'layer_norm2'),
    ('mlp/fc1', 'mlp.fc1'),
    ('mlp/fc2', 'mlp.fc2'),
  ):
    rules += _affine(f'{block}/{path}', f'{name}.{layer}')
  return tuple(rules)


_RELEASED = _released_rules()
_TRANSFORMERS = _transformers_rules()
