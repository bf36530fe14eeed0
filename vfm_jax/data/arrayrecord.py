"""Read sets of encoded videos in ArrayRecord shards.

The data of a record are the bytes of the video file, as they were; see
`data.shards` for the rest, and `data.pack` for what writes them.
"""

import dataclasses
import functools

from vfm_jax.data import avreader, once, shards, sources, video

KIND = shards.Kind(
  format='vfm_jax.videos',
  version=1,
  things='videos',
  command='python -m vfm_jax.data.pack',
  where='data.source.root',
)


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
    name, labels, data = shards.unpack_record(records[index])
    return video.Video(
      name, labels, functools.partial(avreader.EncodedReader, data, name)
    )


@once.once()
def _open(root: str, check_hashes: bool):
  return shards.open_set(KIND, root, check_hashes=check_hashes)
