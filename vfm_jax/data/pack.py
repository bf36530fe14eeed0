"""Pack a folder of videos into ArrayRecord shards.

    python -m vfm_jax.data.pack --root videos --csv train.csv --out packed

The bytes of each file are copied, not transcoded. A video whose first or last
frame does not decode, or whose label is bad, is left out and reported. The
output folder appears only when it is complete; an existing one is refused.
"""

import argparse
import pathlib
from collections.abc import Sequence

import numpy as np

from vfm_jax.data import arrayrecord, avreader, folder, video
from vfm_jax.data import shards as shards_lib


def pack(source: folder.FolderCSV, out: str, shards: int = 1) -> dict:
  """Write a source into `out` and return the manifest.

  Args:
    source: the videos to pack.
    out: folder to create.
    shards: number of files; videos go round-robin.

  Raises:
    FileExistsError: `out` exists already.
    ValueError: no video of the source is usable, or fewer than shards.
  """
  if not 1 <= shards <= len(source):
    raise ValueError(
      f'--shards: {shards} is outside 1..{len(source)}, the number of videos'
    )
  skipped = []
  with shards_lib.Writer(arrayrecord.KIND, out, shards) as writer:
    for index in range(len(source)):
      try:
        writer.write(_record(source, index))
      except video.BadVideo as e:
        skipped.append({'id': e.name, 'reason': e.reason})
    if not all(writer.counts):
      raise ValueError(
        f'--csv: only {sum(writer.counts)} of {len(source)} videos are '
        f'usable, too few for {shards} shards; first problems: {skipped[:3]}'
      )
    return writer.finish(
      {'label_names': list(source.label_names), 'skipped': skipped}
    )


def _record(source: folder.FolderCSV, index: int) -> bytes:
  """Return the record of one video after decoding both of its ends."""
  example = source[index]
  with example.open() as reader:
    reader.read(np.array([0, reader.num_frames - 1]))
  data = pathlib.Path(source.root, example.id).read_bytes()
  # The reader of the packed set sees bytes, not a file: open them so, too.
  avreader.EncodedReader(data, example.id).close()
  return shards_lib.pack_record(example.id, dict(example.labels), data)


def main(argv: Sequence[str] | None = None) -> None:
  """Run the command line."""
  parser = argparse.ArgumentParser(
    prog='python -m vfm_jax.data.pack',
    description='Pack a folder of videos into ArrayRecord shards.',
  )
  parser.add_argument('--root', required=True, help='folder of the videos')
  parser.add_argument('--csv', required=True, help='list of the videos')
  parser.add_argument('--out', required=True, help='folder to create')
  parser.add_argument('--shards', type=int, default=1)
  parser.add_argument(
    '--labels', nargs='*', default=['label'], help='label columns'
  )
  parser.add_argument('--layout', choices=('csv', 'list'), default='csv')
  args = parser.parse_args(argv)
  source = folder.FolderCSV(
    args.root, args.csv, tuple(args.labels), layout=args.layout
  )
  manifest = pack(source, args.out, args.shards)
  for bad in manifest['skipped']:
    print(f'skipped {bad["id"]}: {bad["reason"]}')
  print(
    f'packed {manifest["count"]} videos into {args.out}, '
    f'skipped {len(manifest["skipped"])}'
  )


if __name__ == '__main__':
  main()
