"""Time the training loop against its own jitted step with the data ready.

One process does both: the loop's data source hands out batches from memory, and
at the end of each block of steps it stops the loop's clock, runs as many bare
steps, and lets the loop go on.
"""

import contextlib
import dataclasses
import functools
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax

from benchmarks import results
from vfm_jax import optim, schedules, sharding, train
from vfm_jax.data import augment, clips, pipeline, synthetic
from vfm_jax.data.batches import Stats
from vfm_jax.experiment import Checkpoints, Data, Experiment
from vfm_jax.models.encoders import VideoViT
from vfm_jax.models.predictors import PixelDecoder
from vfm_jax.objectives.masked import Masked

# Two reports fall into each block, twice as often as by default.
STEPS, LOG_EVERY = 20, 10
WARMUP_BLOCKS = 2
BATCH, FRAMES, SIZE = 8, 16, 64
BARS = {'train.train': 1.03}


def run(rounds: int) -> results.Comparison:
  """Compare a step in the loop with a bare one."""
  source = _Paced(
    source=synthetic.MovingShapes(count=4 * BATCH, frames=FRAMES, size=SIZE),
    clip=clips.uniform,
    transform=augment.identity,
  )
  exp = Experiment(
    objective=Masked(
      VideoViT(
        size='S',
        width=192,
        depth=4,
        heads=3,
        patch=8,
        frames=FRAMES,
        image_size=SIZE,
      ),
      PixelDecoder(width=96, depth=1, heads=3),
    ),
    data=Data(train=source),
    optim=optim.Optimizer(lr=functools.partial(schedules.constant, value=1e-4)),
    batch_size=BATCH,
    # The last step only asks for the batch that ends the last block.
    steps=(WARMUP_BLOCKS + rounds) * STEPS + 1,
    log_every=LOG_EVERY,
    checkpoint=Checkpoints(every_steps=10**9),
  )
  source.pace.append(_Pace(exp))
  with (
    tempfile.TemporaryDirectory() as workdir,
    contextlib.redirect_stdout(sys.stderr),
  ):
    train.train(exp, workdir)
  blocks = len(source.pace[0].seconds[0])
  if blocks != WARMUP_BLOCKS + rounds:
    raise RuntimeError(
      f'training stopped after {blocks} of {WARMUP_BLOCKS + rounds} blocks'
    )
  bare, loop = (t[WARMUP_BLOCKS:] for t in source.pace[0].seconds)
  return results.Comparison(
    title='training loop, step of a small masked autoencoder',
    reference='bare step',
    seconds={'bare step': bare, 'train.train': loop},
    bars=BARS,
    notes=(
      f'Blocks of {STEPS} steps, batches in memory, a report every '
      f'{LOG_EVERY} steps, no evaluation and no checkpoint.'
    ),
  )


class _Pace:
  """Alternate blocks of the loop with blocks of bare steps."""

  def __init__(self, exp: Experiment):
    self.seconds: tuple[list[float], list[float]] = ([], [])
    mesh = sharding.make_mesh(exp.mesh)
    shardings = exp.shardings(mesh)
    self._state = exp.first_state(shardings)
    self._step = jax.jit(
      exp.train_step(),
      in_shardings=(shardings, sharding.batch_sharding(mesh)),
      out_shardings=(shardings, None),
      donate_argnums=0,
    )
    self._mesh = mesh

  def batches(self, ready: list[Any]) -> Iterator[Any]:
    """Yield batches to the loop, whose blocks end where ours begin."""
    on_device = sharding.put_batch(ready[0], self._mesh)
    while True:
      begin = _idle()
      for i in range(STEPS):
        yield dict(ready[i % len(ready)])
      between = _idle()
      for _ in range(STEPS):
        self._state, _ = self._step(self._state, on_device)
      end = _idle()
      bare, loop = self.seconds
      loop.append((between - begin) / STEPS)
      bare.append((end - between) / STEPS)


@dataclasses.dataclass(frozen=True)
class _Paced(pipeline.Pipeline):
  """Serve training batches from memory, at the given pace."""

  pace: list[_Pace] = dataclasses.field(default_factory=list)

  def train_batches(self, batch_size: int, **kwargs: Any) -> Any:
    with super().train_batches(batch_size, **kwargs) as batches:
      ready = [next(batches) for _ in range(4)]
    return _Stream(self.pace[0].batches(ready))


class _Stream(Iterator[Any]):
  """Look like `data.batches.Batches`."""

  def __init__(self, batches: Iterator[Any]):
    self.stats = Stats()
    self._batches = batches

  def __next__(self) -> Any:
    return next(self._batches)

  def take_wait_s(self) -> float:
    return 0.0

  def close(self) -> None:
    self._batches.close()


def _idle() -> float:
  """Wait until nothing is left to compute; return the time."""
  jax.block_until_ready(jax.live_arrays())
  return time.perf_counter()
