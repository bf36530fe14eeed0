"""Measure how many clips a second the input pipeline decodes and augments.

Clips of 16 frames, stride 4, of two films, with VideoMAE's crops, by the number
of worker processes. As a program (`python -m benchmarks.input_pipeline WORKERS
FOLDER`) this is one contestant.
"""

import functools
import itertools
import os
import pathlib
import sys
import tempfile

from absl import flags

from benchmarks import decoding, interleave, results
from vfm_jax.data import augment, folder
from vfm_jax.data.pipeline import Pipeline

BATCH = 4
# As many workers as a contestant has; 0 is threads of one process.
WORKERS = tuple(
  n for n in (0, 1, 2, 4, 8, 16) if n <= 2 * len(os.sched_getaffinity(0))
)
MEASURED, DRAINED = 8, 8
TRANSFORM = functools.partial(augment.multi_scale_crop, size=224)


def run(rounds: int) -> results.Rates:
  """Measure each number of workers."""
  with tempfile.TemporaryDirectory() as root:
    films = decoding.films()
    for copy, film in itertools.product(range(decoding.COPIES), decoding.FILMS):
      pathlib.Path(root, f'{copy}_{film}').symlink_to(films / film)
    seconds, info = interleave.compare(
      [
        interleave.Contestant(
          f'{n} workers', ('-m', 'benchmarks.input_pipeline', str(n), root)
        )
        for n in WORKERS
      ],
      rounds=rounds,
      repeats=MEASURED,
      # The pipeline reads ahead after its measurement.
      settle=4.0,
    )
  return results.Rates(
    title='input pipeline',
    unit='clips/s',
    values={
      name: [BATCH / s for s in times] for name, times in seconds.items()
    },
    notes=(
      f'16 frames, stride 4, of {" and ".join(decoding.FILMS)}, cropped and '
      f'scaled to 224 x 224, batches of {BATCH}, on '
      f'{len(os.sched_getaffinity(0))} CPU cores.'
    ),
    info=info,
  )


def _serve(workers: int, root: str) -> None:
  flags.FLAGS(['input_pipeline'])  # the workers of grain ask for them
  pipeline = Pipeline(folder.FolderVideos(root), decoding.CLIP, TRANSFORM)
  batches = pipeline.train_batches(BATCH, seed=0, workers=workers)
  interleave.serve(
    lambda: next(batches),
    before=lambda: [next(batches) for _ in range(DRAINED)],
    warmup=1,
    work={'batch': BATCH},
  )


if __name__ == '__main__':
  _serve(int(sys.argv[1]), sys.argv[2])
