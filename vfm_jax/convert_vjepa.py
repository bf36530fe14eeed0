"""Convert V-JEPA and V-JEPA 2 checkpoints to parameters, strictly both ways.

Released files hold an encoder, a predictor and, beside them, the encoder's
average ('target_encoder'); those of `transformers` one encoder and a predictor.
Attentive probes come under the names of either.
"""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vfm_jax import convert
from vfm_jax.convert import ConversionError, Source
from vfm_jax.models.encoders import ROTATIONS, VideoViT
from vfm_jax.models.vjepa import LatentPredictor
from vfm_jax.ops import positions as pos

PyTree = Any

_PARTS = ('encoder', 'predictor', 'target_encoder')

# Largest difference of a table in a file from the one that we compute.
_TABLE_ATOL = 1e-3

# Our layer, its released name and its names in transformers, joined if many.
_BLOCK = (
  ('norm1', 'norm1', ('norm1',)),
  ('norm2', 'norm2', ('norm2',)),
  (
    'attn/qkv',
    'attn.qkv',
    tuple(f'attention.{x}' for x in ('query', 'key', 'value')),
  ),
  ('attn/proj', 'attn.proj', ('attention.proj',)),
  *((f'mlp/fc{i}', f'mlp.fc{i}', (f'mlp.fc{i}',)) for i in (1, 2, 3)),
)
_ENCODER = (
  ('patch_embed', 'patch_embed.proj', ('embeddings.patch_embeddings.proj',)),
  ('norm', 'norm', ('layernorm',)),
  *(
    (
      rf'blocks_(\d+)/{x}',
      rf'blocks.\1.{y}',
      tuple(rf'layer.\1.{n}' for n in z),
    )
    for x, y, z in _BLOCK
  ),
)
_PREDICTOR = (
  ('embed', 'predictor_embed', ('embeddings.predictor_embeddings',)),
  ('norm', 'predictor_norm', ('layernorm',)),
  ('proj', 'predictor_proj', ('proj',)),
  *((x, f'{x}_encoder', ()) for x in ('action', 'state', 'extrinsics')),
  *(
    (
      rf'blocks_(\d+)/{x}',
      rf'predictor_blocks.\1.{y}',
      tuple(rf'layer.\1.{n}' for n in z),
    )
    for x, y, z in _BLOCK
  ),
)
_CROSS = 'cross_attention_layer'
_SELF = {
  'norm1': ('layer_norm1',),
  'norm2': ('layer_norm2',),
  'attn/qkv': tuple(f'self_attn.{x}_proj' for x in 'qkv'),
  'attn/proj': ('self_attn.out_proj',),
}
_POOLER = (
  (
    'xattn/q',
    'cross_attention_block.xattn.q',
    (f'{_CROSS}.cross_attn.q_proj',),
  ),
  (
    'xattn/kv',
    'cross_attention_block.xattn.kv',
    tuple(f'{_CROSS}.cross_attn.{x}_proj' for x in 'kv'),
  ),
  *(
    (f'norm{i}', f'cross_attention_block.norm{i}', (f'{_CROSS}.layer_norm{i}',))
    for i in (1, 2)
  ),
  *(
    (f'mlp/fc{i}', f'cross_attention_block.mlp.fc{i}', (f'{_CROSS}.mlp.fc{i}',))
    for i in (1, 2)
  ),
  *(
    (
      rf'blocks_(\d+)/{x}',
      rf'blocks.\1.{y}',
      tuple(rf'self_attention_layers.\1.{n}' for n in _SELF.get(x, z)),
    )
    for x, y, z in _BLOCK
  ),
)
_UNUSED = {
  r'(pooler\.)?cross_attention_block\.(xattn\.)?proj\.(weight|bias)': (
    'a projection that V-JEPA makes and never applies'
  )
}


def from_vjepa(
  state: convert.State,
  template: PyTree,
  *,
  encoder: VideoViT | None = None,
  predictor: LatentPredictor | None = None,
  ignore: Mapping[str, str] | None = None,
) -> PyTree:
  """Return the parameters of a V-JEPA or V-JEPA 2 checkpoint.

  Args:
    state: tensors by name: of an encoder, of a predictor, or of all parts under
      'encoder.', 'predictor.' and 'target_encoder.', see `read`.
    template: parameters, or their shapes: any of {'encoder': ..., 'predictor':
      ..., 'target': ...}, where 'target' is the encoder's average. A file
      without one (transformers) gives its encoder for both.
    encoder: that the template is of. A position table in the file has to be the
      one that it computes; an encoder that rotates has none, and leaves it out.
    predictor: the same for the predictor, of that encoder's clips.
    ignore: reasons by regular expression, for further tensors to leave out.

  Returns:
    Float32 numpy arrays in the structure of the template.

  Raises:
    ConversionError: names each tensor that is missing, of no use, or of a
      shape that does not fit; or a position table is another one.
  """
  ignored = dict(ignore or {})
  tables = []
  if encoder is not None:
    pattern = r'(?:(?:target_)?encoder\.)?pos_embed'
    tables.append((pattern, encoder.positions, encoder.dims.width))
    if predictor is not None:
      pattern = r'(?:predictor\.)?predictor_pos_embed'
      tables.append((pattern, predictor.positions, predictor.width))
  for pattern, kind, width in tables:
    if kind not in ROTATIONS:
      _check_tables(state, pattern, kind, encoder, width)
    ignored[pattern] = 'computed, or not used by a model that rotates'
  if 'action' in template.get('predictor', {}):
    ignored[r'(?:predictor\.)?extrinsics_encoder\.(weight|bias)'] = (
      'made for every predictor, applied by those that take extrinsics'
    )
  return convert.fill(state, template, sources, ignore=ignored)


def from_probe(
  state: convert.State,
  template: PyTree,
  *,
  ignore: Mapping[str, str] | None = None,
) -> PyTree:
  """Return the parameters of an attentive probe.

  Args:
    state: tensors by name, of V-JEPA, V-JEPA 2 or transformers.
    template: parameters, or their shapes, of an `AttentiveClassifier`; of an
      `AttentivePooler` as {'pooler': ...}.
    ignore: reasons by regular expression, for further tensors to leave out:
      those of the encoder, in a file of transformers.

  Returns:
    Float32 numpy arrays in the structure of the template.

  Raises:
    ConversionError: as `from_vjepa`.
  """
  ignored = {**_UNUSED, **(ignore or {})}
  return convert.fill(state, template, probe_sources, ignore=ignored)


def read(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """Read the weights of a V-JEPA file, the names of each part before its own.

  What a training file holds beside them (optimizer, epoch) is not read. Files
  of other formats are read as they are, see `convert.read_entry`.

  Args:
    path: a torch, .safetensors or .npz file.

  Raises:
    ConversionError: see `convert.read_entry`.
  """
  path = pathlib.Path(path)
  if path.suffix in ('.safetensors', '.npz'):
    return convert.read_checkpoint(path)
  saved = convert.read_torch(path)
  parts = [p for p in _PARTS if isinstance(saved.get(p), Mapping)]
  if not parts:
    return convert.read_checkpoint(path)
  out = {}
  for part in parts:
    _, state = convert.read_entry(path, entry=part)
    out |= {f'{part}.{name}': x for name, x in state.items()}
  return out


def sources(paths: Sequence[str], state: convert.State) -> dict[str, Source]:
  """Return where each parameter comes from, by its path.

  Args:
    paths: parameter paths with unrolled blocks, such as
      'encoder/blocks_0/attn/qkv/kernel'.
    state: the checkpoint; only its names are looked at.

  Raises:
    ConversionError: a path is not one of a V-JEPA model.
  """
  hugging = any('patch_embeddings.' in name for name in state)
  out = {}
  for path in paths:
    part, _, rest = path.partition('/')
    rules = _PREDICTOR if part == 'predictor' else _ENCODER
    prefix = _prefix(part, state, hugging)
    if part == 'predictor' and rest == 'mask_tokens':
      names = _mask_tokens(prefix, state, hugging)
      out[path] = Source(names, _rows)
    else:
      out[path] = _source(path, rest, rules, prefix, hugging)
  return out


def probe_sources(
  paths: Sequence[str], state: convert.State
) -> dict[str, Source]:
  """Return where each parameter of a probe comes from, by its path.

  Args:
    paths: parameter paths with unrolled blocks, such as 'pooler/norm1/scale'.
    state: the checkpoint; only its names are looked at.

  Raises:
    ConversionError: a path is not one of a probe.
  """
  hugging = any(f'{_CROSS}.' in name for name in state)
  whole = any(name.startswith('pooler.') for name in state)
  complete = any('xattn.' in name for name in state)
  out = {}
  for path in paths:
    part, _, rest = path.partition('/')
    prefix = 'pooler.' if whole else ''
    if path == 'pooler/query_tokens':
      out[path] = Source((f'{prefix}query_tokens',), _rows)
      continue
    if part == 'linear':
      rules, rest, prefix = (('linear', 'linear', ('classifier',)),), path, ''
    else:
      rules = _POOLER
    source = _source(path, rest, rules, prefix, hugging)
    if not hugging and not complete:
      names = tuple(n.replace('.xattn.', '.') for n in source.names)
      source = Source(names, source.convert)
    out[path] = source
  return out


def _source(path, rest, rules, prefix, hugging) -> Source:
  """Return where a parameter comes from, by the rules of its part."""
  layer, _, leaf = rest.rpartition('/')
  suffix = 'bias' if leaf == 'bias' else 'weight'
  for pattern, released, others in rules:
    match = re.fullmatch(pattern, layer)
    if match is None or leaf not in ('kernel', 'scale', 'bias'):
      continue
    names = others if hugging else (released,)
    return Source(
      tuple(f'{prefix}{match.expand(n)}.{suffix}' for n in names),
      _layout(layer, leaf),
    )
  raise ConversionError(f'no tensor of V-JEPA is known for {path}')


def _layout(layer, leaf):
  """Return what makes a parameter of a tensor."""
  if layer.endswith('attn/qkv'):
    return convert.qkv_kernel if leaf == 'kernel' else convert.qkv_bias
  if layer == 'patch_embed' and leaf == 'kernel':
    return convert.convolution
  return convert.transpose


def _prefix(part, state, hugging) -> str:
  """Return what the names of a part begin with."""
  if hugging:
    whole = any(name.startswith('vjepa2.') for name in state)
    name = 'predictor' if part == 'predictor' else 'encoder'
    return f'{"vjepa2." if whole else ""}{name}.'
  names = {'target': ('target_encoder', 'encoder')}.get(part, (part,))
  for name in names:
    if any(n.startswith(f'{name}.') for n in state):
      return f'{name}.'
  return ''


def _mask_tokens(prefix, state, hugging) -> tuple[str, ...]:
  """Return the names of the mask tokens that there are, in order."""
  if hugging:
    return (f'{prefix}embeddings.mask_tokens',)
  start = f'{prefix}mask_tokens.'
  names = [n for n in state if n.startswith(start)]
  return tuple(sorted(names, key=lambda n: int(n[len(start) :]))) or (
    f'{start}0',
  )


def _rows(x, shape):
  """Return learned tokens [1, Q, D] as [Q, D]."""
  return x.reshape(shape)


def _check_tables(state, pattern, kind, encoder, width) -> None:
  """Refuse a position table that is not the one of the model."""
  table = pos.fixed_table(kind, width, encoder.built_grid)
  for name in state:
    if not re.fullmatch(pattern, name):
      continue
    found = np.asarray(state[name], np.float32).reshape(-1, width)
    if found.shape != table.shape or not np.allclose(
      found, table, rtol=0, atol=_TABLE_ATOL
    ):
      raise ConversionError(
        f'{name} {np.shape(state[name])} is not the table that the model '
        f'computes, {kind!r} {table.shape}; change `positions`, `frames` or '
        '`image_size` of `objective.encoder`'
      )
