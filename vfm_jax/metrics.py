"""Accumulate metrics on the device and write them where people look.

`MetricBuffer` keeps the scalars of each step on the device and hands an
interval over when the next one has passed, so that the loop never waits for
the newest step. `ThroughputMeter` measures what the host sees. Writers take
host numbers: a progress line, JSON lines, TensorBoard events, pictures, and
Weights & Biases where it is installed.
"""

import contextlib
import datetime
import hashlib
import json
import math
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
import tensorboardX
from clu import metrics as clu_metrics
from tensorboardX.proto import summary_pb2

from vfm_jax import plots
from vfm_jax.optional import require

# Protocol buffers make their classes at import, where no checker sees them.
_Summary = summary_pb2.Summary  # pyright: ignore[reportAttributeAccessIssue]


class MetricBuffer:
  """Average the scalars of each step, one interval late.

      buffer.append(step, metrics)      # every step: no transfer
      done = buffer.flush()             # every interval: the one before it

  A metric that only some steps report is averaged over those steps.
  """

  def __init__(self):
    self._step: int | None = None
    self._sums: dict[str, clu_metrics.Average] = {}
    self._pending: tuple[int, dict[str, jax.Array]] | None = None

  def append(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Add the scalars of a step; they stay on the device."""
    self._step = step
    self._sums = _merge(self._sums, dict(metrics))

  def flush(self) -> tuple[int, dict[str, float]] | None:
    """Close the interval and return the one closed before it.

    Returns:
      The last step of that interval and the mean of each metric, or None
      when there is none yet. Waits for that interval only.
    """
    ready, self._pending = self._pending, None
    if self._step is not None:
      means = _means(self._sums)
      for x in means.values():
        x.copy_to_host_async()
      self._pending = self._step, means
      self._step, self._sums = None, {}
    if ready is None:
      return None
    step, means = ready
    return step, {k: float(np.asarray(v)) for k, v in means.items()}

  def drain(self) -> tuple[int, dict[str, float]] | None:
    """Return what `flush` still holds; for the end of training."""
    if self._step is not None:
      raise RuntimeError('drain() loses an open interval: call flush() first')
    return self.flush()


@jax.jit
def _merge(sums, metrics):
  out = dict(sums)
  for name, value in metrics.items():
    one = clu_metrics.Average.from_model_output(jnp.asarray(value, jnp.float32))
    out[name] = one if name not in out else out[name].merge(one)
  return out


@jax.jit
def _means(sums):
  return {name: state.compute() for name, state in sums.items()}


class ThroughputMeter:
  """Measure examples a second, step time, and the wait for data.

      with meter.waiting():
        batch = next(batches)
      state = train_step(state, batch)
      meter.step()
      with meter.paused():
        evaluate()

  The clock starts when the first step has been dispatched, which leaves its
  compilation out; paused time does not count. Steps are dispatched ahead of
  the device, so an interval of a few steps measures the host; over a logging
  interval the two agree, because logs wait for the device.
  """

  def __init__(
    self, batch_size: int, *, clock: Callable[[], float] = time.perf_counter
  ):
    self._batch_size = batch_size
    self._clock = clock
    self._start: float | None = None
    self._reset()

  def _reset(self):
    self._steps, self._waited, self._paused = 0, 0.0, 0.0

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Count the time inside as waiting for data."""
    begin = self._clock()
    yield
    self._waited += self._clock() - begin

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leave the time inside out (evaluation, saving, compilation)."""
    begin = self._clock()
    yield
    self._paused += self._clock() - begin

  def step(self) -> None:
    """Count a dispatched step."""
    if self._start is None:
      self._start = self._clock()
      self._reset()
    else:
      self._steps += 1

  def flush(self) -> dict[str, float]:
    """Return the rates since the last call; empty before the second step.

    `examples_per_s`, `step_s` in seconds, and `data_wait`, the fraction of
    the time spent waiting for batches.
    """
    if self._start is None or not self._steps:
      return {}
    now = self._clock()
    spent = max(now - self._start - self._paused, 1e-9)
    out = {
      'examples_per_s': self._steps * self._batch_size / spent,
      'step_s': spent / self._steps,
      'data_wait': min(self._waited / spent, 1.0),
    }
    self._start = now
    self._reset()
    return out


def device_memory() -> dict[str, float]:
  """Return the peak GiB in use on the first local device; empty on CPUs."""
  stats = jax.local_devices()[0].memory_stats() or {}
  peak = stats.get('peak_bytes_in_use')
  return {} if peak is None else {'device_gib': peak / 2**30}


class Writer:
  """Where numbers, clips and text of a run go.

  A writer overrides what it has a place for and ignores the rest.
  """

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Write named numbers."""

  def videos(self, step: int, values: Mapping[str, np.ndarray]) -> None:
    """Write kinds of the same clips by name, uint8 [B, T, H, W, 3] each."""

  def text(self, step: int, values: Mapping[str, str]) -> None:
    """Write named texts."""

  def close(self) -> None:
    """Flush and release what is open."""


class MultiWriter(Writer):
  """Hand everything to each of several writers, possibly none."""

  def __init__(self, writers: Iterable[Writer] = ()):
    self.writers = tuple(writers)

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Write named numbers."""
    for w in self.writers:
      w.scalars(step, values)

  def videos(self, step: int, values: Mapping[str, np.ndarray]) -> None:
    """Write named clips uint8 [B, T, H, W, 3]."""
    for w in self.writers:
      w.videos(step, values)

  def text(self, step: int, values: Mapping[str, str]) -> None:
    """Write named texts."""
    for w in self.writers:
      w.text(step, values)

  def close(self) -> None:
    """Close each writer."""
    for w in self.writers:
      w.close()


def make_writer(
  workdir: str,
  *,
  total_steps: int,
  start_step: int = 0,
  tensorboard: bool = True,
  wandb: str | None = None,
  config: Mapping[str, Any] | None = None,
) -> MultiWriter:
  """Return the writers of a run; on all but process 0, none.

  Args:
    workdir: gets `metrics.jsonl`, `events/` and `media/`.
    total_steps: length of the run, for the progress line.
    start_step: step that was restored; what was written past it is dropped.
    tensorboard: write TensorBoard events.
    wandb: project to log to, if any.
    config: recorded with the wandb run.

  Raises:
    ImportError: `wandb` is asked for and not installed.
  """
  if jax.process_index():
    return MultiWriter()
  folder = pathlib.Path(workdir)
  writers: list[Writer] = [
    ProgressWriter(total_steps, start_step=start_step),
    JsonlWriter(folder / 'metrics.jsonl', start_step=start_step),
    MediaWriter(folder / 'media'),
  ]
  if tensorboard:
    writers.append(TensorBoardWriter(folder / 'events', start_step=start_step))
  if wandb:
    writers.append(WandbWriter(wandb, workdir=workdir, config=config))
  return MultiWriter(writers)


class ProgressWriter(Writer):
  """Print one line a report: how far, how fast, how well."""

  def __init__(
    self,
    total_steps: int,
    *,
    start_step: int = 0,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.perf_counter,
  ):
    self._total = total_steps
    self._stream = sys.stdout if stream is None else stream
    self._clock = clock
    self._from = (start_step, clock())

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Print the step and, of training reports, what matters at a glance."""
    parts = [f'step {step}/{self._total} {100 * step / self._total:5.1f}%']
    if 'loss' in values:
      parts += self._training(step, values)
    else:
      parts += [f'{k} {v:.4g}' for k, v in values.items()]
    print(' | '.join(parts), file=self._stream, flush=True)

  def _training(self, step: int, values: Mapping[str, float]) -> list[str]:
    begin, since = self._from
    seconds = values.get('step_s')
    if seconds is None and step > begin:
      seconds = (self._clock() - since) / (step - begin)
    parts = []
    if seconds is not None:
      left = round(seconds * max(self._total - step, 0))
      parts.append(f'eta {datetime.timedelta(seconds=left)}')
    for name, show in (
      ('examples_per_s', '{:.4g} examples/s'),
      ('data_wait', 'data wait {:.0%}'),
      ('device_gib', '{:.1f} GiB'),
      ('loss', 'loss {:.4f}'),
      ('lr', 'lr {:.2e}'),
    ):
      if name in values:
        parts.append(show.format(values[name]))
    return parts


class JsonlWriter(Writer):
  """Append one JSON object a write; a restarted run never doubles a curve.

  Lines past `start_step`, and a last line that was cut off, are dropped on
  opening. Values that are not finite become null.
  """

  def __init__(self, path: str | os.PathLike, *, start_step: int = 0):
    self._path = pathlib.Path(path)
    self._path.parent.mkdir(parents=True, exist_ok=True)
    if self._path.exists():
      lines = self._path.read_text().splitlines()
      kept = [s for s in lines if _step_of(s) <= start_step]
      fresh = self._path.with_name(self._path.name + '.tmp')
      fresh.write_text(''.join(f'{s}\n' for s in kept))
      os.replace(fresh, self._path)
    self._file = self._path.open('a')

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Append the step, the wall time in seconds and the values."""
    row: dict[str, Any] = {'step': int(step), 'time': round(time.time(), 3)}
    for name, value in values.items():
      value = float(value)
      row[name] = value if math.isfinite(value) else None
    self._append(row)

  def text(self, step: int, values: Mapping[str, str]) -> None:
    """Append the step and the texts."""
    self._append({'step': int(step), 'text': dict(values)})

  def _append(self, row: Mapping[str, Any]) -> None:
    self._file.write(json.dumps(row) + '\n')
    self._file.flush()

  def close(self) -> None:
    """Close the file."""
    self._file.close()


def _step_of(line: str) -> float:
  """Return the step of a line, infinity where it was cut off."""
  try:
    return json.loads(line)['step']
  except (json.JSONDecodeError, KeyError, TypeError):
    return math.inf


class MediaWriter(Writer):
  """Write clips as a still grid (PNG) and an animation (GIF) a report."""

  def __init__(self, folder: str | os.PathLike):
    self._folder = pathlib.Path(folder)

  def videos(self, step: int, values: Mapping[str, np.ndarray]) -> None:
    """Write `<step>.png` and `<step>.gif`, kinds side by side."""
    self._folder.mkdir(parents=True, exist_ok=True)
    stem = self._folder / f'{step:08d}'
    plots.clip_grid(values, stem.with_suffix('.png'), title=f'step {step}')
    plots.animate(values, stem.with_suffix('.gif'))


class TensorBoardWriter(Writer):
  """Write TensorBoard events; clips become an animated image."""

  def __init__(self, folder: str | os.PathLike, *, start_step: int = 0):
    # purge_step makes TensorBoard hide what an earlier run wrote past it.
    self._writer = tensorboardX.SummaryWriter(
      os.fspath(folder), purge_step=start_step + 1 if start_step else None
    )

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Write a point on each curve."""
    for name, value in values.items():
      self._writer.add_scalar(name, float(value), step)
    self._writer.flush()

  def videos(self, step: int, values: Mapping[str, np.ndarray]) -> None:
    """Write one looping animation of the kinds side by side."""
    data = plots.gif_bytes(values)
    height, width = plots.gif_size(data)
    summary = _Summary(
      value=[
        _Summary.Value(
          tag='clips',
          image=_Summary.Image(
            height=height,
            width=width,
            colorspace=3,
            encoded_image_string=data,
          ),
        )
      ]
    )
    assert self._writer.file_writer is not None
    self._writer.file_writer.add_summary(summary, step)
    self._writer.flush()

  def text(self, step: int, values: Mapping[str, str]) -> None:
    """Write each text under its name."""
    for name, value in values.items():
      self._writer.add_text(name, value, step)
    self._writer.flush()

  def close(self) -> None:
    """Close the event file."""
    self._writer.close()


class WandbWriter(Writer):
  """Log to Weights & Biases; a restart of a workdir continues its run."""

  def __init__(
    self,
    project: str,
    *,
    workdir: str,
    config: Mapping[str, Any] | None = None,
  ):
    self._wandb = require('wandb', 'wandb')
    path = os.path.abspath(workdir)
    self._run = self._wandb.init(
      project=project,
      name=os.path.basename(path),
      id=hashlib.sha256(path.encode()).hexdigest()[:16],
      resume='allow',
      dir=path,
      config=dict(config or {}),
    )
    # Training reports arrive one interval late, after evaluations of later
    # steps; wandb's own step refuses to go back.
    self._run.define_metric('*', step_metric='step')

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Log a point on each curve."""
    self._run.log({'step': step, **{k: float(v) for k, v in values.items()}})

  def videos(self, step: int, values: Mapping[str, np.ndarray]) -> None:
    """Log one looping animation of the kinds side by side."""
    with tempfile.TemporaryDirectory() as folder:
      path = plots.animate(values, pathlib.Path(folder, 'clips.gif'))
      video = self._wandb.Video(os.fspath(path), format='gif')
      self._run.log({'step': step, 'clips': video})

  def close(self) -> None:
    """Finish the run."""
    self._run.finish()
