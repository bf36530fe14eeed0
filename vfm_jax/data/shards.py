"""Write and read records in ArrayRecord shards, checked by a manifest.

Record i is in shard i % S at place i // S: what is read at an index does not
depend on the number of shards S. `manifest.json` beside the shards holds their
counts, sizes and SHA-256; the folder of a set appears only when it is complete.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

MANIFEST = 'manifest.json'


@dataclasses.dataclass(frozen=True)
class Kind:
  """Say what a set is of.

  Attributes:
    format: name of the format in the manifest.
    version: of the format.
    things: what a record is, in the plural.
    command: what writes such sets.
    where: config path of their folder, for messages.
  """

  format: str
  version: int
  things: str
  command: str
  where: str


class Writer:
  """Write a set; a context manager that leaves nothing behind on an error.

  Attributes:
    counts: records of each shard so far.
  """

  def __init__(self, kind: Kind, out: str | os.PathLike, shards: int = 1):
    """Open the shards.

    Raises:
      FileExistsError: `out` exists already.
    """
    from array_record.python import (
      array_record_module,  # pyright: ignore[reportAttributeAccessIssue]
    )

    self._kind, self._target = kind, pathlib.Path(out)
    if self._target.exists():
      raise FileExistsError(
        f'{out} exists already; remove it, or write somewhere else'
      )
    self._partial = self._target.with_name(f'.{self._target.name}.partial')
    shutil.rmtree(self._partial, ignore_errors=True)
    self._partial.mkdir(parents=True)
    self._names = [
      f'{kind.things}-{s:05d}-of-{shards:05d}.array_record'
      for s in range(shards)
    ]
    self._writers = [
      array_record_module.ArrayRecordWriter(
        str(self._partial / name), 'group_size:1'
      )
      for name in self._names
    ]
    self.counts = [0] * shards

  def write(self, record: bytes) -> None:
    """Add a record."""
    shard = sum(self.counts) % len(self.counts)
    self._writers[shard].write(record)
    self.counts[shard] += 1

  def finish(self, about: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest, make the folder visible and return the manifest.

    Args:
      about: what the manifest says beside the shards.
    """
    self._close()
    manifest = {
      'format': self._kind.format,
      'version': self._kind.version,
      'count': sum(self.counts),
      'shards': [
        {
          'file': name,
          'count': count,
          'bytes': (self._partial / name).stat().st_size,
          'sha256': sha256(self._partial / name),
        }
        for name, count in zip(self._names, self.counts, strict=True)
      ],
      **about,
    }
    text = json.dumps(manifest, indent=2)
    (self._partial / MANIFEST).write_text(text, encoding='utf-8')
    self._partial.rename(self._target)
    return manifest

  def _close(self) -> None:
    for writer in self._writers:
      writer.close()
    self._writers = []

  def __enter__(self) -> 'Writer':
    return self

  def __exit__(self, *exc: object) -> None:
    self._close()
    shutil.rmtree(self._partial, ignore_errors=True)


class Records:
  """Give the records of a set by their number."""

  def __init__(self, records: Any, shards: int):
    self._records, self._shards = records, shards

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> bytes:
    n, shards = len(self), self._shards
    shard, place = index % shards, index // shards
    # Shards before this one; the first n % shards hold one more.
    before = shard * (n // shards) + min(shard, n % shards)
    return self._records[before + place]


def open_set(
  kind: Kind, root: str, *, check_hashes: bool
) -> tuple[dict[str, Any], Records]:
  """Verify a set against its manifest and open it: (manifest, records).

  Args:
    kind: that it must be of.
    root: its folder.
    check_hashes: compare the SHA-256 of every shard, which reads all data once.

  Raises:
    ValueError: the manifest is missing or of another format, or a shard is
      missing, truncated or changed.
  """
  from array_record.python import array_record_data_source

  manifest = _manifest(kind, root)
  shards = manifest['shards']
  files = [os.path.join(root, s['file']) for s in shards]
  for file, shard in zip(files, shards, strict=True):
    if not os.path.isfile(file):
      raise ValueError(f'{kind.where}: shard is missing: {file}')
    size = os.path.getsize(file)
    if size != shard['bytes']:
      raise ValueError(
        f'{kind.where}: shard {file} has {size} bytes, the manifest says '
        f'{shard["bytes"]}'
      )
    if check_hashes and (found := sha256(file)) != shard['sha256']:
      raise ValueError(
        f'{kind.where}: shard {file} differs from the SHA-256 of its '
        f'manifest: expected {shard["sha256"]}, found {found}; copy or write '
        'the set again'
      )
  records = array_record_data_source.ArrayRecordDataSource(files)
  if len(records) != manifest['count']:
    raise ValueError(
      f'{kind.where}: {root} holds {len(records)} {kind.things}, its manifest '
      f'says {manifest["count"]}'
    )
  return manifest, Records(records, len(shards))


def sha256(file: str | os.PathLike) -> str:
  """Return the SHA-256 of a file in hexadecimal."""
  with open(file, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def pack_record(name: str, labels: Mapping[str, int], data: bytes) -> bytes:
  """Return a record: 4 bytes of length, a JSON header of that length, data."""
  header = json.dumps({'id': name, 'labels': dict(labels)}).encode()
  return len(header).to_bytes(4, 'little') + header + data


def unpack_record(record: bytes) -> tuple[str, dict[str, int], bytes]:
  """Return (id, labels, data) of a record."""
  end = 4 + int.from_bytes(record[:4], 'little')
  header = json.loads(record[4:end])
  return header['id'], header['labels'], record[end:]


def _manifest(kind: Kind, root: str) -> dict[str, Any]:
  file = os.path.join(root, MANIFEST)
  try:
    with open(file, encoding='utf-8') as f:
      manifest = json.load(f)
  except OSError as e:
    raise ValueError(
      f'{kind.where}: no {MANIFEST} in {root}; write the set with '
      f'{kind.command}'
    ) from e
  except json.JSONDecodeError as e:
    raise ValueError(f'{kind.where}: {file} is not JSON: {e}') from e
  found = manifest.get('format'), manifest.get('version')
  if found != (kind.format, kind.version):
    raise ValueError(
      f'{kind.where}: {file} has format {found}, expected '
      f'{(kind.format, kind.version)}'
    )
  return manifest
