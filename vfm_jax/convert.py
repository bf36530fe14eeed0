"""Convert VideoMAE checkpoints to parameters, strictly both ways.

Three layouts of names are known: the released pretraining and fine-tuning
models of VideoMAE and VideoMAE V2, and the one of `transformers`. Every tensor
of the file is used or ignored by a rule that gives its reason, every parameter
is set, and every shape is checked.
"""

import contextlib
import contextvars
import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from vfm_jax import torch_files, torch_stream, trees
from vfm_jax.nn import transformer
from vfm_jax.torch_files import ConversionError

PyTree = Any
State = Mapping[str, np.ndarray]

# Where released files keep the weights, and what wrappers add to names.
_WRAPPERS = ('model', 'module', 'target_encoder', 'encoder', 'state_dict')
_PREFIXES = ('module.', '_orig_mod.', 'backbone.')


@dataclasses.dataclass(frozen=True)
class Source:
  """Say where a parameter comes from.

  Attributes:
    names: tensors of the checkpoint; several are stacked along the first
      axis.
    convert: function (tensor, shape of the parameter) -> array.
  """

  names: tuple[str, ...]
  convert: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


@dataclasses.dataclass
class Usage:
  """Say what became of the tensors of a checkpoint.

  Attributes:
    used: names of those that parameters came from.
    left_out: reasons, by name, of the others.
  """

  used: set[str] = dataclasses.field(default_factory=set)
  left_out: dict[str, str] = dataclasses.field(default_factory=dict)


_usage: contextvars.ContextVar[Usage | None] = contextvars.ContextVar(
  'usage', default=None
)


@contextlib.contextmanager
def recorded() -> Iterator[Usage]:
  """Record what `fill` does with tensors while the context is open."""
  usage = Usage()
  token = _usage.set(usage)
  try:
    yield usage
  finally:
    _usage.reset(token)


def from_videomae(
  state: State,
  template: PyTree,
  *,
  ignore: Mapping[str, str] | None = None,
) -> PyTree:
  """Return the parameters of a VideoMAE checkpoint.

  Args:
    state: tensors by name, in any of the three layouts.
    template: parameters, or their shapes, that are wanted: {'encoder': ...}
      or {'encoder': ..., 'decoder': ...}, with unrolled or scanned blocks.
    ignore: reasons by regular expression, for tensors that are left out on
      purpose, such as {r'decoder\\..*': 'only the encoder is used'}.

  Returns:
    Float32 numpy arrays in the structure of the template.

  Raises:
    ConversionError: names each tensor that is missing, of no use, or of a
      shape that does not fit.
  """
  return fill(state, template, sources, ignore=ignore)


def fill(
  state: State,
  template: PyTree,
  find: Callable[[Sequence[str], State], Mapping[str, Source]],
  *,
  ignore: Mapping[str, str] | None = None,
) -> PyTree:
  """Set every parameter of a template and use every tensor of a checkpoint.

  Args:
    state: tensors by name.
    template: parameters, or their shapes, with unrolled or scanned blocks.
    find: the layout: (parameter paths with unrolled blocks, state) -> where
      each comes from.
    ignore: reasons by regular expression, for tensors to leave out.

  Returns:
    Float32 numpy arrays in the structure of the template.

  Raises:
    ConversionError: see `from_videomae`.
  """
  unrolled = jax.eval_shape(transformer.unstack_blocks, template)
  shapes = {path: leaf.shape for path, leaf in trees.path_leaves(unrolled)}
  wanted = find(tuple(shapes), state)
  problems, params, used = [], {}, set()
  for path, source in wanted.items():
    missing = [n for n in source.names if n not in state]
    used.update(source.names)
    if missing:
      problems.append(f'missing: {", ".join(missing)} for {path}')
      continue
    tensor = _join([np.asarray(state[n], np.float32) for n in source.names])
    try:
      params[path] = source.convert(tensor, shapes[path])
      fits = params[path].shape == shapes[path]
    except ValueError:
      fits = False
    if not fits:
      problems.append(
        f'reshaped: {", ".join(source.names)} is {tensor.shape}, which does '
        f'not give {path} {shapes[path]}'
      )
  left_out = {}
  for name in sorted(set(state) - used):
    rules = [r for r in ignore or {} if re.fullmatch(r, name)]
    if ignore and rules:
      left_out[name] = ignore[rules[0]]
    else:
      problems.append(
        f'unused: {name} {np.shape(state[name])}; the model has no such '
        'parameter and no rule of `ignore` gives a reason'
      )
  if problems:
    raise ConversionError(
      'the checkpoint does not fit the model:\n  ' + '\n  '.join(problems)
    )
  if (usage := _usage.get()) is not None:
    usage.used |= used
    usage.left_out |= left_out
  params = traverse_util.unflatten_dict(params, sep='/')
  same = jax.tree.structure(unrolled) == jax.tree.structure(template)
  if same:
    return params
  return jax.tree.map(np.asarray, transformer.stack_blocks(params))


def sources(paths: Sequence[str], state: State) -> dict[str, Source]:
  """Return where each parameter comes from, by its path.

  Args:
    paths: parameter paths with unrolled blocks, such as
      'encoder/blocks_0/attn/qkv/kernel'.
    state: the checkpoint; only its names are looked at.

  Raises:
    ConversionError: a path is not one of a VideoMAE model.
  """
  hugging = any(name.startswith('videomae.') for name in state)
  rules = _TRANSFORMERS if hugging else _RELEASED
  # Pretraining models keep the encoder under a name of its own.
  prefix = ''
  if not hugging and any(n.startswith('encoder.') for n in state):
    prefix = 'encoder.'
  out = {}
  for path in paths:
    for pattern, names, convert in rules:
      match = re.fullmatch(pattern, path)
      if match is None:
        continue
      names = [
        match.expand(name).replace('<encoder>', prefix) for name in names
      ]
      if hugging:
        names = [_older_name(name, state) for name in names]
      out[path] = Source(tuple(names), convert)
      break
    else:
      raise ConversionError(f'no VideoMAE tensor is known for {path}')
  return out


def read_checkpoint(
  path: str | pathlib.Path, *, entry: str | None = None
) -> dict[str, np.ndarray]:
  """Read the tensors of a file, as `read_entry` does, without saying which."""
  return read_entry(path, entry=entry)[1]


def read_entry(
  path: str | pathlib.Path, *, entry: str | None = None
) -> tuple[str | None, dict[str, np.ndarray]]:
  """Read the tensors of a .safetensors or .npz file, or one of torch.

  Those end in .pt, .pth, .pth.tar or .bin. Wrappers ('model', 'module',
  'target_encoder', 'encoder', 'state_dict') and name prefixes of wrapped
  modules are removed. Torch is not needed.

  Args:
    path: the file.
    entry: entry of a torch file that holds the weights, such as 'ema'; None
      for the first wrapper there is, or the file itself.

  Returns:
    The entry that was read, or None for the file itself, and its tensors by
    name; those of a torch file as float32.

  Raises:
    ConversionError: a torch file that is cut off, of another format, or holds
      something else than tensors.
    ValueError: another suffix, or no such entry.
  """
  path = pathlib.Path(path)
  if path.suffix in ('.pt', '.pth', '.bin') or path.name.endswith('.pth.tar'):
    entry, state = _torch_state(path, entry)
  elif entry is not None:
    raise ValueError(
      f'expected a torch file to read the entry {entry!r} of, found '
      f'{path.name}, which has no entries; leave --entry out'
    )
  elif path.suffix == '.safetensors':
    from safetensors.numpy import load_file

    state = load_file(path)
  elif path.suffix == '.npz':
    with np.load(path, allow_pickle=False) as file:
      state = dict(file)
  else:
    raise ValueError(
      'expected a checkpoint .safetensors, .npz, .pt, .pth, .pth.tar or .bin, '
      f'found {path.name}'
    )
  out = {}
  for name, tensor in state.items():
    while any(name.startswith(p) for p in _PREFIXES):
      name = name.split('.', 1)[1]
    if name in out:
      raise ConversionError(
        f'{path}: expected one tensor for {name}, found two that differ in '
        f'their prefix alone, of {_PREFIXES}'
      )
    out[name] = tensor
  return entry, out


def read_torch(path: str | pathlib.Path) -> Mapping[str, Any]:
  """Return what a torch file holds, with a `Tensor` for each tensor.

  Raises:
    ConversionError: it can't be read, or holds something else than a dict.
  """
  old = torch_stream.is_stream(path)
  saved = (torch_stream if old else torch_files).read(path)
  if not isinstance(saved, Mapping):
    raise ConversionError(
      f'{path}: expected a dict of tensors, found a {type(saved).__name__}'
    )
  return saved


def _torch_state(path, entry):
  """Return the entry that is read, and its tensors."""
  saved = read_torch(path)
  if entry is not None and entry not in saved:
    raise ValueError(
      f'expected an entry {entry!r} in {path.name}, found '
      f'{sorted(map(str, saved))}'
    )
  if entry is None:
    entry = next(
      (w for w in _WRAPPERS if isinstance(saved.get(w), Mapping)), None
    )
  state = saved if entry is None else saved[entry]
  if not isinstance(state, Mapping):
    raise ConversionError(
      f'{path}: expected a dict of tensors as the entry {entry!r}, found a '
      f'{type(state).__name__}'
    )
  if bad := [k for k, v in state.items() if not _is_tensor(v)]:
    raise ConversionError(
      f'{path}: expected tensors alone, found others under {bad[:5]}; name '
      'the entry that holds the weights with --entry, one of '
      f'{sorted(map(str, saved))}'
    )
  arrays = {k: np.asarray(v.read(), np.float32) for k, v in state.items()}
  return entry, arrays


def _is_tensor(value):
  return isinstance(value, torch_files.Tensor)


def to_torch(path: str, x: np.ndarray) -> np.ndarray:
  """Return a parameter as torch has it: matrices (out, in), flat biases."""
  if path.endswith('kernel'):
    return x.reshape(len(x), -1).T
  return x.ravel() if path.endswith('bias') else x


def transpose(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Return a Linear weight as a kernel; a scale, of one axis, as it is."""
  del shape
  return x.T


def qkv_kernel(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Return a fused weight as the kernel [D, 3, H, D/H].

  Rows are [q | k | v], each by heads.

  Raises:
    ValueError: another shape than [3 * D, D].
  """
  if x.shape != (np.prod(shape[1:]), shape[0]):
    raise ValueError
  return x.T.reshape(shape)


def qkv_bias(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Return a fused bias as [3, H, D/H]."""
  return x.reshape(shape)


def _join(tensors):
  return tensors[0] if len(tensors) == 1 else np.concatenate(tensors)


def _same(x, shape):
  # Tables and tokens of a batch of one: [1, N, D] and [1, 1, D].
  return x.reshape(shape) if x.size == np.prod(shape) and x.ndim > 1 else x


def convolution(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Return a kernel (out, in, t, h, w) as [P, out], P in order (t h w in)."""
  del shape
  return x.transpose(2, 3, 4, 1, 0).reshape(-1, x.shape[0])


def _older_name(name, state):
  """Return the name that older `transformers` gave to a bias of q or v."""
  older = re.sub(r'\.(query|value)\.bias$', lambda m: f'.{m[1][0]}_bias', name)
  return older if older in state else name


def _affine(path, name):
  return [
    (rf'{path}/(?:scale|kernel)', [f'{name}.weight'], transpose),
    (rf'{path}/bias', [f'{name}.bias'], _same),
  ]


def _released_rules():
  rules = []
  for part, prefix in (('encoder', '<encoder>'), ('decoder', 'decoder.')):
    block, name = rf'{part}/blocks_(\d+)', rf'{prefix}blocks.\1'
    rules += [
      (rf'{block}/attn/qkv/kernel', [rf'{name}.attn.qkv.weight'], qkv_kernel),
      (rf'{block}/attn/qkv/bias', [rf'{name}.attn.qkv.bias'], qkv_bias),
      (rf'{block}/attn/([qv]_bias)', [rf'{name}.attn.\2'], _same),
      (rf'{block}/attn/log_scale', [rf'{name}.attn.scale'], _same),
      (rf'{block}/(gamma_[12])', [rf'{name}.\2'], _same),
      *_affine(rf'{block}/attn/proj', rf'{name}.attn.proj'),
    ]
    for layer in ('mlp.fc1', 'mlp.fc2', 'norm1', 'norm2'):
      path = layer.replace('.', '/')
      rules += _affine(rf'{block}/{path}', rf'{name}.{layer}')
    for layer in ('norm', 'fc_norm', 'head'):
      rules += _affine(rf'{part}/{layer}', rf'{prefix}{layer}')
  return tuple(rules) + _ends('<encoder>patch_embed.proj')


def _ends(stem):
  return (
    ('encoder/patch_embed/kernel', [f'{stem}.weight'], convolution),
    ('encoder/patch_embed/bias', [f'{stem}.bias'], _same),
    ('encoder/pos_embed', ['<encoder>pos_embed'], _same),
    ('decoder/embed/kernel', ['encoder_to_decoder.weight'], transpose),
    ('decoder/mask_token', ['mask_token'], _same),
  )


def _transformers_rules():
  rules = []
  parts = (
    ('encoder', 'videomae.encoder.layer.'),
    ('decoder', 'decoder.decoder_layers.'),
  )
  for part, prefix in parts:
    block, name = rf'{part}/blocks_(\d+)', rf'{prefix}\1'
    heads = rf'{name}.attention.attention'
    weights = [f'{heads}.{x}.weight' for x in ('query', 'key', 'value')]
    rules += [
      (rf'{block}/attn/qkv/kernel', weights, qkv_kernel),
      (rf'{block}/attn/q_bias', [f'{heads}.query.bias'], _same),
      (rf'{block}/attn/v_bias', [f'{heads}.value.bias'], _same),
    ]
    for path, layer in (
      ('attn/proj', 'attention.output.dense'),
      ('mlp/fc1', 'intermediate.dense'),
      ('mlp/fc2', 'output.dense'),
      ('norm1', 'layernorm_before'),
      ('norm2', 'layernorm_after'),
    ):
      rules += _affine(rf'{block}/{path}', rf'{name}.{layer}')
  for path, layer in (
    ('encoder/norm', 'videomae.layernorm'),
    ('encoder/fc_norm', 'fc_norm'),
    ('encoder/head', 'classifier'),
    ('decoder/norm', 'decoder.norm'),
    ('decoder/head', 'decoder.head'),
  ):
    rules += _affine(path, layer)
  return tuple(rules) + _ends('videomae.embeddings.patch_embeddings.projection')


_RELEASED = _released_rules()
_TRANSFORMERS = _transformers_rules()
