"""Say what must be the same for all processes of a run.

A process with an older package, or with another list of examples, would train
on with the others, and nobody would see it in the curves.
"""

import dataclasses
import hashlib
import importlib.metadata
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from vfm_jax.data import shards, video

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
# Examples of a source, evenly spread, whose names and labels are compared.
_EXAMPLES = 64


def packages() -> dict[str, str]:
  """Return the versions of what computes, and a digest of this package."""
  digest = hashlib.sha256()
  root = pathlib.Path(__file__).parent
  for path in sorted(root.rglob('*.py')):
    digest.update(str(path.relative_to(root)).encode())
    digest.update(path.read_bytes())
  versions = {p: importlib.metadata.version(p) for p in _PACKAGES}
  return versions | {'vfm_jax': f'source {digest.hexdigest()[:12]}'}


def data(data: Any) -> dict[str, str]:
  """Return one line a source: its length and a digest of what it lists.

  A set with a manifest is known by it, a list by its file; of others some
  examples are named. Nothing is decoded.

  Args:
    data: an object with pipelines in its fields, at any depth.

  Raises:
    OSError: a list cannot be read.
    ValueError: a set is damaged.
  """
  lines = [
    f'{path}: {len(source)} examples, {_digest(source)}'
    for path, source in _sources(data, 'data')
  ]
  return {'data': '\n'.join(lines)}


def _sources(value: Any, path: str) -> Iterator[tuple[str, Any]]:
  """Yield (path, source) of what is in the fields of an object."""
  if isinstance(value, tuple):
    for i, item in enumerate(value):
      yield from _sources(item, f'{path}.{i}')
  elif dataclasses.is_dataclass(value):
    if hasattr(value, '__len__') and hasattr(value, '__getitem__'):
      yield path, value
      return
    for field in dataclasses.fields(value):
      yield from _sources(getattr(value, field.name), f'{path}.{field.name}')


def _digest(source: Sequence[Any]) -> str:
  """Return 12 hex digits that change with what a source lists."""
  digest = hashlib.sha256()
  root, listed = (getattr(source, n, None) for n in ('root', 'csv'))
  manifest = pathlib.Path(root or '', shards.MANIFEST)
  if root and manifest.is_file():
    digest.update(manifest.read_bytes())
  elif listed:
    digest.update(pathlib.Path(listed).read_bytes())
  else:
    step = max(len(source) // _EXAMPLES, 1)
    for i in itertools.islice(range(0, len(source), step), _EXAMPLES):
      digest.update(_described(source, i).encode())
  return digest.hexdigest()[:12]


def _described(source: Sequence[Any], index: int) -> str:
  try:
    example = source[index]
  except video.BadVideo as e:
    return str(e)
  return f'{example.id} {sorted(example.labels.items())}\n'
