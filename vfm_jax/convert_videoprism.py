"""Convert the released trees of VideoPrism to parameters, strictly both ways.

Files are .npz with one array a leaf, named by its path. Blocks are stacked
along a leading axis (`x_layers`) or apart (`x_layers_0`, ...). LayerNorms
store their scale less one.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from vfm_jax import convert
from vfm_jax.convert import PyTree, Source, State
from vfm_jax.torch_files import ConversionError

# Weights of the video-text models that embed no video.
TEXT = {r'(params/)?text_encoder/.*': 'the text tower embeds no video'}


def from_videoprism(
  state: State,
  template: PyTree,
  *,
  ignore: Mapping[str, str] | None = None,
) -> PyTree:
  """Return the parameters of a `VideoPrism`, or of a model that has one.

  Args:
    state: arrays by name, as `convert.read_checkpoint` gives them.
    template: parameters, or their shapes, of a `VideoPrism`, a
      `VideoPrismClassifier` or a `VideoPrismClip`.
    ignore: reasons by regular expression, for tensors to leave out, such as
      `TEXT`.

  Returns:
    Float32 numpy arrays in the structure of the template.

  Raises:
    ConversionError: names each tensor that is missing, of no use, or of a
      shape that does not fit; layer i of a stack is named `x_layers/...[i]`.
  """
  return convert.fill(unstacked(state), template, sources, ignore=ignore)


def unstacked(state: State) -> dict[str, np.ndarray]:
  """Return a state with `x_layers/...` cut into `x_layers/...[0]`, ..."""
  out = {}
  for name, x in state.items():
    if '/x_layers/' in name:
      out |= {f'{name}[{i}]': x[i] for i in range(len(x))}
    else:
      out[name] = x
  return out


def sources(paths: Sequence[str], state: State) -> dict[str, Source]:
  """Return where each parameter comes from, by its path.

  Args:
    paths: parameter paths with unrolled blocks.
    state: the checkpoint, `unstacked`; only its names are looked at.

  Raises:
    ConversionError: a path is not one of a VideoPrism model.
  """
  stacked = any('/x_layers/' in name for name in state)
  root = 'params/' if any(n.startswith('params/') for n in state) else ''
  # An encoder may be the whole model, in ours as in the file.
  inside = any(p.startswith('encoder/') for p in paths)
  roles = 'vision_encoder/', 'encoder/'
  role = next((r for r in roles if _has(state, r)), '')
  pooler = 'atten_pooler'
  if role == roles[0]:
    pooler = 'contrastive_vision_pooler'
  out = {}
  for path in paths:
    inner = path.removeprefix('encoder/')
    start = root + (role if inner != path or not inside else '')
    # Norms on both sides of a branch have names of their own.
    both = f'{path.rpartition("/")[0]}_post/scale' in paths
    words = {'<pooler>': pooler, '<pre>': 'pre_' if both else ''}
    for pattern, names, read in _RULES:
      match = re.fullmatch(pattern, inner)
      if match is None:
        continue
      names = [_layer(match.expand(name), stacked) for name in names]
      for word, value in words.items():
        names = [name.replace(word, value) for name in names]
      out[path] = Source(tuple(start + name for name in names), read)
      break
    else:
      raise ConversionError(f'no VideoPrism tensor is known for {path}')
  return out


def _has(state, start):
  return any(n.removeprefix('params/').startswith(start) for n in state)


def _layer(name, stacked):
  if not stacked:
    return name
  return re.sub(r'x_layers_(\d+)/(.*)', r'x_layers/\2[\1]', name)


def _same(x, shape):
  del shape
  return x


def _plus_one(x, shape):
  del shape
  return 1.0 + x


def _row(x, shape):
  # A token, as the only row or alone in a batch of one.
  if x.size != np.prod(shape):
    raise ValueError
  return x.reshape(shape)


def _qkv_kernel(x, shape):
  # Three [D, H, D/H] to [D, 3, H, D/H].
  dim, _, *heads = shape
  if x.shape != (3 * dim, *heads):
    raise ValueError
  return x.reshape(3, dim, *heads).swapaxes(0, 1)


def _qkv_bias(x, shape):
  # Three [H, D/H] to [3, H, D/H].
  if x.shape != (3 * shape[1], shape[2]):
    raise ValueError
  return x.reshape(shape)


def _heads_kernel(x, shape):
  # [D, H, D/H] to [D, H * D/H].
  del shape
  return x.reshape(len(x), -1)


def _heads_bias(x, shape):
  # [H, D/H] to [H * D/H].
  if x.ndim != 2:
    raise ValueError
  return x.reshape(shape)


def _out_kernel(x, shape):
  # [D, H, D/H], by output, to [H * D/H, D].
  del shape
  return x.reshape(len(x), -1).T


def _norm(path, name):
  return [
    (rf'{path}/scale', [f'{name}/scale'], _plus_one),
    (rf'{path}/bias', [f'{name}/bias'], _same),
  ]


def _dense(path, name):
  return [
    (rf'{path}/({leaf})', [rf'{name}/linear/{leaf}'], _same)
    for leaf in ('kernel', 'bias')
  ]


def _block(path, name):
  """Return the rules of a block, under any policy of norms."""
  attention, mlp = rf'{name}/self_attention', rf'{name}/ff_layer'
  qkv = [rf'{attention}/{part}' for part in ('query', 'key', 'value')]
  rules = [
    (rf'{path}/attn/qkv/kernel', [f'{n}/w' for n in qkv], _qkv_kernel),
    (rf'{path}/attn/qkv/bias', [f'{n}/b' for n in qkv], _qkv_bias),
    (rf'{path}/attn/proj/kernel', [f'{attention}/post/w'], _out_kernel),
    (rf'{path}/attn/proj/bias', [f'{attention}/post/b'], _same),
    *_dense(rf'{path}/mlp/fc1', rf'{mlp}/ffn_layer1'),
    *_dense(rf'{path}/mlp/fc2', rf'{mlp}/ffn_layer2'),
  ]
  for i, owner in enumerate((name, mlp), 1):
    rules += _norm(rf'{path}/norm{i}_post', f'{owner}/post_layer_norm')
    rules += _norm(rf'{path}/norm{i}', f'{owner}/<pre>layer_norm')
  return rules


def _pooler_rules():
  attention = '<pooler>/pooling_attention'
  rules = [
    ('pooler/query_token', [f'{attention}_query'], _row),
    ('pooler/q_scale', [f'{attention}/per_dim_scale/per_dim_scale'], _same),
    ('pooler/proj/kernel', [f'{attention}/post/w'], _out_kernel),
    ('pooler/proj/bias', [f'{attention}/post/b'], _same),
    *_norm('pooler/norm', f'{attention}_layer_norm'),
  ]
  for letter, part in (('q', 'query'), ('k', 'key'), ('v', 'value')):
    name = f'{attention}/{part}'
    rules += [
      (f'pooler/{letter}/kernel', [f'{name}/w'], _heads_kernel),
      (f'pooler/{letter}/bias', [f'{name}/b'], _heads_bias),
    ]
  return rules


def _rules():
  rules = [
    *_dense('patch_embed', 'patch_projection'),
    ('spatial_pos_embed', ['spatial_pos_emb/emb_var'], _same),
    ('temporal_pos_embed', ['temporal_pos_emb/emb_var'], _same),
    *_norm('spatial/norm', 'spatial_ln'),
    *_norm('temporal/norm', 'temporal_ln'),
    *_dense('head', 'projection'),
    ('text/tokens', ['text_encoder/token_emb/emb_var'], _same),
    ('text/class_token', ['text_encoder/cls_emb'], _row),
    *_norm('text/norm', 'text_encoder/unimodal_ln'),
    *_pooler_rules(),
  ]
  for part, name in (
    ('spatial', 'spatial_encoder/transformers_stack'),
    ('temporal', 'temporal_encoder/transformers_stack'),
    ('auxiliary', 'auxiliary_encoder/transformers_stack'),
    ('text', 'text_encoder/unimodal_transformer'),
  ):
    rules += _block(rf'{part}/blocks_(\d+)', rf'{name}/x_layers_\1')
  return tuple(rules)


_RULES = _rules()
