"""Describe what to run as data: `ref`, `bind`, `build`.

A recipe is a function `get_config(arg)` that returns an
`ml_collections.ConfigDict`. Callables enter it by name: `ref(VideoViT,
size='B')` stands for the object that `VideoViT(size='B')` returns, `bind(tube,
ratio=0.9)` for `functools.partial(tube, ratio=0.9)`. Keyword names are checked
where the recipe is written; defaults of the callable are filled in, so that
the text of a config is complete and each value can be changed on the command
line (`--config.objective.mask.ratio=0.75`). `build` turns it into objects.
Nothing here touches a device.
"""

import dataclasses
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import pathlib
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeAlias

import ml_collections
import typeguard
from ml_collections import config_dict

ConfigDict: TypeAlias = ml_collections.ConfigDict

_REF = '_ref'
_BIND = '_bind'
_SCALARS = (bool, int, float, str)
# Set by Linen itself; never a recipe's to choose.
_LINEN_FIELDS = ('parent', 'name')


class ConfigError(ValueError):
  """Say what is wrong with a config, with the path of the value to change."""


def ref(target: Callable[..., Any], /, **kwargs: Any) -> ConfigDict:
  """Name the object that `target(**kwargs)` will build.

  Args:
    target: a class or function that can be imported by its name.
    **kwargs: its arguments: values, or further `ref` and `bind` nodes.

  Raises:
    ConfigError: a keyword that `target` does not take (with the nearest
      names), a required one that is missing, or a value of the wrong type.
  """
  return _node(_REF, target, kwargs)


def bind(target: Callable[..., Any], /, **kwargs: Any) -> ConfigDict:
  """Name `functools.partial(target, **kwargs)`; errors as in `ref`."""
  return _node(_BIND, target, kwargs)


def build(config: Any) -> Any:
  """Turn nodes into objects, innermost first.

  Plain sub-dicts become dicts; tuples and lists are mapped. The config is
  validated as a whole before the first object is made.
  """
  validate(config)
  return _build(config, ())


def validate(config: Any, path: tuple[str, ...] = ()) -> None:
  """Check names, required arguments and types of every node.

  Raises:
    ConfigError: naming the config path, what was expected and what was found.
  """
  if isinstance(config, ConfigDict):
    if (kind := _kind(config)) is not None:
      target = _resolve(str(config[kind]), path)
      _check(kind, target, _arguments(config), path)
    for key, value in _items(config):
      validate(value, (*path, key))
  elif isinstance(config, (tuple, list)):
    for i, value in enumerate(config):
      validate(value, (*path, str(i)))


def to_text(config: ConfigDict) -> str:
  """Print one `path = value` line a leaf, sorted: the form of the overrides."""
  return ''.join(f'{path} = {value!r}\n' for path, value in _leaves(config, ()))


def fingerprint(config: ConfigDict) -> str:
  """Return 12 hex digits that change when any value of the config does."""
  return hashlib.sha256(to_text(config).encode()).hexdigest()[:12]


def load(spec: str) -> ConfigDict:
  """Return the config of `path/to/recipe.py` or `path/to/recipe.py:argument`.

  Raises:
    ConfigError: no such file, or one without `get_config`.
  """
  filename, _, argument = spec.partition(':')
  path = pathlib.Path(filename)
  if not path.is_file():
    near = difflib.get_close_matches(
      path.name, [p.name for p in path.parent.glob('*.py')], n=3
    )
    raise ConfigError(
      f'--config: no recipe at {filename!r}'
      + (f'; did you mean {", ".join(near)}?' if near else '')
    )
  module_spec = importlib.util.spec_from_file_location(
    f'configs_{path.stem}', path
  )
  assert module_spec is not None
  assert module_spec.loader is not None
  module = importlib.util.module_from_spec(module_spec)
  module_spec.loader.exec_module(module)
  if not hasattr(module, 'get_config'):
    raise ConfigError(f'--config: {filename!r} has no function get_config')
  config = module.get_config(argument or None)
  config.lock()
  return config


def variant(arg: str | None, variants: Mapping[str, Any]) -> Any:
  """Return `variants[arg]`, with '' for no argument, or name what there is.

  Raises:
    ConfigError: the recipe has no variant of that name.
  """
  key = arg or ''
  if key not in variants:
    known = ', '.join(repr(f':{k}') if k else 'none' for k in variants)
    raise ConfigError(f'--config: unknown variant {key!r}; there is {known}')
  return variants[key]


def _node(
  kind: str, target: Callable[..., Any], kwargs: Mapping[str, Any]
) -> ConfigDict:
  _check(kind, target, kwargs, ())
  filled = {**_defaults(target, kwargs), **kwargs}
  node = ConfigDict({kind: _name(target)})
  for key, value in filled.items():
    if isinstance(value, dict):
      value = ConfigDict(value)
    elif callable(value) or dataclasses.is_dataclass(value):
      value = _as_config(value, None)
    node[key] = value
  return node


def _name(target: Callable[..., Any]) -> str:
  name = f'{target.__module__}:{target.__qualname__}'
  if '<' in name:
    raise ConfigError(
      f'{name} cannot be named in a config: give a module-level function or '
      'class, so that a run can be repeated from its text'
    )
  return name


def _resolve(name: str, path: tuple[str, ...]) -> Callable[..., Any]:
  module, _, attribute = name.partition(':')
  try:
    return functools.reduce(
      getattr, attribute.split('.'), importlib.import_module(module)
    )
  except (ImportError, AttributeError) as e:
    raise ConfigError(f'{_show(path)}: cannot find {name}: {e}') from e


def _kind(config: ConfigDict) -> str | None:
  return next((k for k in (_REF, _BIND) if k in config), None)


def _items(config: ConfigDict) -> Iterator[tuple[str, Any]]:
  for key in config:
    if key not in (_REF, _BIND):
      yield key, config[key]


def _arguments(config: ConfigDict) -> dict[str, Any]:
  # A placeholder that nobody set reads as None: its callable's own default.
  return dict(_items(config))


def _build(config: Any, path: tuple[str, ...]) -> Any:
  if isinstance(config, (tuple, list)):
    return type(config)(
      _build(v, (*path, str(i))) for i, v in enumerate(config)
    )
  if not isinstance(config, ConfigDict):
    return config
  arguments = {k: _build(v, (*path, k)) for k, v in _items(config)}
  kind = _kind(config)
  if kind is None:
    return arguments
  target = _resolve(str(config[kind]), path)
  if kind == _BIND:
    return functools.partial(target, **arguments)
  try:
    return target(**arguments)
  except ConfigError:
    raise
  except (ValueError, TypeError) as e:
    raise ConfigError(f'{_show(path)}: {config[kind]}: {e}') from e


def _parameters(
  target: Callable[..., Any],
) -> dict[str, inspect.Parameter]:
  parameters = dict(inspect.signature(target).parameters)
  if _is_linen(target):
    for name in _LINEN_FIELDS:
      parameters.pop(name, None)
  return parameters


def _is_linen(target: Callable[..., Any]) -> bool:
  return isinstance(target, type) and any(
    base.__module__ == 'flax.linen.module' for base in target.__mro__
  )


def _check(
  kind: str,
  target: Callable[..., Any],
  kwargs: Mapping[str, Any],
  path: tuple[str, ...],
) -> None:
  parameters = _parameters(target)
  takes_any = any(
    p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
  )
  hints = _hints(target)
  for key, value in kwargs.items():
    if key not in parameters:
      if not takes_any:
        _unknown(target, key, parameters, path)
      continue
    unset = value is None and parameters[key].default is None
    if key in hints and not unset:
      _check_type(value, hints[key], (*path, key))
  if kind == _REF:
    missing = [
      name
      for name, p in parameters.items()
      if p.default is inspect.Parameter.empty
      and p.kind
      not in (
        inspect.Parameter.VAR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
      )
      and name not in kwargs
    ]
    if missing:
      raise ConfigError(
        f'{_show(path)}: {target.__qualname__} needs {", ".join(missing)}'
      )


def _unknown(
  target: Callable[..., Any],
  key: str,
  parameters: Mapping[str, Any],
  path: tuple[str, ...],
) -> NoReturn:
  near = difflib.get_close_matches(key, parameters, n=3)
  hint = f'; did you mean {", ".join(near)}?' if near else ''
  raise ConfigError(
    f'{_show((*path, key))}: {target.__qualname__} takes no {key!r}{hint} '
    f'(it takes {", ".join(parameters)})'
  )


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
  try:
    return typing.get_type_hints(target)
  except (NameError, TypeError):
    # Built-ins and third-party callables may carry no usable annotations.
    return {}


def _check_type(value: Any, hint: Any, path: tuple[str, ...]) -> None:
  if isinstance(value, (ConfigDict, dict)) or callable(value):
    return  # a node: checked against its own callable
  if isinstance(value, (tuple, list)) and any(
    isinstance(v, ConfigDict) for v in value
  ):
    return
  wrong = isinstance(value, bool) and not _admits_bool(hint)
  if not wrong:
    try:
      typeguard.check_type(value, hint)
    except typeguard.TypeCheckError:
      wrong = True
  if wrong:
    shown = getattr(hint, '__name__', None) if isinstance(hint, type) else None
    raise ConfigError(
      f'{_show(path)}: expected {shown or str(hint).replace("typing.", "")}, '
      f'found {value!r} ({type(value).__name__})'
    )


def _admits_bool(hint: Any) -> bool:
  if hint in (bool, Any, object):
    return True
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    return any(_admits_bool(h) for h in typing.get_args(hint))
  return typing.get_origin(hint) is typing.Literal


def _defaults(
  target: Callable[..., Any], given: Mapping[str, Any]
) -> dict[str, Any]:
  hints, parameters = _hints(target), _parameters(target)
  factories = {
    f.name: f.default_factory
    for f in (
      dataclasses.fields(target) if dataclasses.is_dataclass(target) else ()
    )
    if f.default_factory is not dataclasses.MISSING
  }
  out = {}
  for name, parameter in parameters.items():
    if name in given or parameter.default is inspect.Parameter.empty:
      continue
    default = factories[name]() if name in factories else parameter.default
    value = _as_config(default, hints.get(name))
    if value is not None:
      out[name] = value
  return out


def _as_config(default: Any, hint: Any) -> Any:
  """Return `default` as it appears in a config, or None to leave it out."""
  if default is None:
    kinds = [h for h in typing.get_args(hint) if h is not type(None)]
    kind = typing.get_origin(kinds[0]) or kinds[0] if len(kinds) == 1 else None
    if kind in (*_SCALARS, tuple):
      return config_dict.placeholder(kind)
    return None
  if isinstance(default, _SCALARS):
    return default
  if isinstance(default, tuple) and all(
    isinstance(v, _SCALARS) for v in default
  ):
    return default
  if isinstance(default, functools.partial):
    return bind(default.func, **default.keywords)
  if inspect.isfunction(default) or inspect.isclass(default):
    return bind(default)
  if dataclasses.is_dataclass(default) and not isinstance(default, type):
    return ref(
      type(default),
      **{
        f.name: value
        for f in dataclasses.fields(default)
        if f.init
        and (value := _as_config(getattr(default, f.name), None)) is not None
      },
    )
  return None


def _leaves(config: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
  if isinstance(config, ConfigDict):
    for key in sorted(config):
      yield from _leaves(config[key], (*path, key))
  elif isinstance(config, (tuple, list)) and any(
    isinstance(v, ConfigDict) for v in config
  ):
    for i, value in enumerate(config):
      yield from _leaves(value, (*path, str(i)))
  else:
    yield '.'.join(path), config


def _show(path: tuple[str, ...]) -> str:
  return '.'.join(('config', *path))
