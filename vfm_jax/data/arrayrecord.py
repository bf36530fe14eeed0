"""Read and write sets of encoded videos in ArrayRecord shards.

One record is a 4-byte little-endian length, a JSON header of that length
({"id": ..., "labels": {...}}) and the bytes of the video file, as they were.
`manifest.json` beside the shards holds the counts, checksums and label names.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib

from vfm_jax.data import avreader, once, sources, video

FORMAT = 'vfm_jax.videos'
VERSION = 1
MANIFEST = 'manifest.json'


@dataclasses.dataclass(frozen=True)
class ArrayRecordVideos:
  """Read what `python -m vfm_jax.data.pack` wrote.

  Attributes:
    root: folder of the shards and of `manifest.json`.
    check_hashes: compare the SHA-256 of every shard at the start, which reads
      all data once.
  """

  root: str
  check_hashes: bool = False

  @property
  def label_names(self) -> tuple[str, ...]:
    """Names of the labels."""
    return tuple(_open(self.root, self.check_hashes)[0]['label_names'])

  def __len__(self) -> int:
    return _open(self.root, self.check_hashes)[0]['count']

  def __getitem__(self, index: int) -> video.Video:
    manifest, records = _open(self.root, self.check_hashes)
    sources.check_index(index, manifest['count'])
    name, labels, data = unpack_record(records[index])
    return video.Video(
      name, labels, functools.partial(avreader.EncodedReader, data, name)
    )


def pack_record(name: str, labels: dict[str, int], data: bytes) -> bytes:
  """Return one record."""
  header = json.dumps({'id': name, 'labels': labels}).encode()
  return len(header).to_bytes(4, 'little') + header + data


def unpack_record(record: bytes) -> tuple[str, dict[str, int], bytes]:
  """Return (id, labels, bytes of the video file) of one record."""
  end = 4 + int.from_bytes(record[:4], 'little')
  header = json.loads(record[4:end])
  return header['id'], header['labels'], record[end:]


def sha256(file: str | pathlib.Path) -> str:
  """Return the SHA-256 of a file in hexadecimal."""
  with open(file, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


@once.once()
def _open(root: str, check_hashes: bool):
  """Verify a packed set against its manifest and open it: (manifest, data)."""
  from array_record.python import array_record_data_source

  manifest = _manifest(root)
  files = [os.path.join(root, s['file']) for s in manifest['shards']]
  for file, shard in zip(files, manifest['shards'], strict=True):
    if not os.path.isfile(file):
      raise ValueError(f'data.source.root: shard is missing: {file}')
    size = os.path.getsize(file)
    if size != shard['bytes']:
      raise ValueError(
        f'data.source.root: shard {file} has {size} bytes, the manifest says '
        f'{shard["bytes"]}'
      )
    if check_hashes and sha256(file) != shard['sha256']:
      raise ValueError(
        f'data.source.root: shard {file} differs from the SHA-256 of its '
        'manifest'
      )
  records = array_record_data_source.ArrayRecordDataSource(files)
  if len(records) != manifest['count']:
    raise ValueError(
      f'data.source.root: {root} holds {len(records)} videos, its manifest '
      f'says {manifest["count"]}'
    )
  return manifest, records


def _manifest(root: str) -> dict:
  file = os.path.join(root, MANIFEST)
  try:
    with open(file, encoding='utf-8') as f:
      manifest = json.load(f)
  except OSError as e:
    raise ValueError(
      f'data.source.root: no {MANIFEST} in {root}; write the set with '
      'python -m vfm_jax.data.pack'
    ) from e
  except json.JSONDecodeError as e:
    raise ValueError(f'data.source.root: {file} is not JSON: {e}') from e
  found = manifest.get('format'), manifest.get('version')
  if found != (FORMAT, VERSION):
    raise ValueError(
      f'data.source.root: {file} has format {found}, expected '
      f'{(FORMAT, VERSION)}'
    )
  return manifest
