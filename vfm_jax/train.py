"""Run THE training loop: set up, restore, step, log, evaluate, save.

The loop knows an objective only through its protocol and never waits for the
device: metrics are fetched one report late.
"""

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from vfm_jax import config as config_lib
from vfm_jax import metrics as metrics_lib
from vfm_jax import plots, runtime, sharding
from vfm_jax import step as step_lib
from vfm_jax.evals import reconstruct
from vfm_jax.evals.base import InRun
from vfm_jax.experiment import Experiment
from vfm_jax.objectives import base, frozen
from vfm_jax.ops import attention_table


class NonFiniteError(RuntimeError):
  """Say which parameters had no finite gradient for too many steps."""


def train(
  exp: Experiment, workdir: str, *, config: config_lib.ConfigDict | None = None
) -> dict[str, float]:
  """Train until `exp.total_steps`, from the last checkpoint if there is one.

  Args:
    exp: what to run.
    workdir: where metrics, pictures and checkpoints go; made if absent.
    config: what `exp` was built from, recorded beside its results.

  Returns:
    First and last loss and the last value of each evaluation metric.

  Raises:
    NonFiniteError: `exp.max_skipped` steps in a row were not finite.
    OSError: `workdir` cannot be written.
  """
  check_writable(workdir)
  # What evaluations read from files is asked for before the hours go by.
  if isinstance(exp.objective, frozen.Frozen):
    exp.objective.frozen()
  mesh = sharding.make_mesh(exp.mesh)
  shardings = exp.shardings(mesh)
  teachers = exp.teachers(mesh)
  info = _record(workdir, config)
  with contextlib.ExitStack() as stack:
    stack.enter_context(sharding.activations(mesh))
    saved = stack.enter_context(exp.checkpointer(workdir, info))
    if saved.latest_step() is not None:
      _tell_changes(saved.read_info(), info)
      state = saved.restore(exp.abstract_state, shardings)
    else:
      state = exp.first_state(shardings)
    start = int(state.step)
    writer = stack.enter_context(
      contextlib.closing(
        metrics_lib.make_writer(
          workdir,
          total_steps=exp.total_steps,
          start_step=start,
          wandb=exp.wandb,
          config=info,
        )
      )
    )
    preemption = stack.enter_context(runtime.Preemption())
    watchdog = stack.enter_context(_watchdog(exp))
    profiler = stack.enter_context(_profiler(exp, workdir))
    loop = _Loop(exp, workdir, mesh, writer)
    attentions = stack.enter_context(attention_table.recorded())
    step_fn = exp.jitted_step(mesh)
    if start == 0 and exp.eval_at_start:
      loop.evaluate(0, state)
    batches = loop.batches(start)
    for step in range(start + 1, exp.total_steps + 1):
      with loop.meter.waiting():
        batch = next(batches)
      state, metrics = step_fn(state, batch, teachers)
      if step == start + 1:
        logging.info('%s', attention_table.table(attentions))
      loop.record(step, metrics)
      watchdog.beat(step)
      profiler.step(step)
      stop = preemption.requested(step)
      last = stop or step == exp.total_steps
      if step % exp.log_every == 0 or last:
        loop.report(last=last)
      # A preempted run has seconds left: save first and evaluate never.
      if saved.should_save(step) or last:
        with loop.meter.paused():
          saved.save(step, state, force=True)
      if stop:
        saved.wait()
        logging.warning('Preempted: saved step %d, leaving.', step)
        break
      if last or (exp.eval_every and step % exp.eval_every == 0):
        loop.evaluate(step, state)
    saved.wait()
  return _results(workdir) if jax.process_index() == 0 else {}


def check_writable(workdir: str) -> None:
  """Make the work directory.

  Raises:
    OSError: it cannot be made or written; names it and the flag.
  """
  try:
    os.makedirs(workdir, exist_ok=True)
    with tempfile.TemporaryFile(dir=workdir):
      pass
  except OSError as e:
    raise OSError(
      f'cannot write to the work directory {workdir!r} ({e.strerror}); '
      'change --workdir'
    ) from e


def run_evals(exp: Experiment, params, mesh, workdir: str) -> dict[str, float]:
  """Return the metrics of every evaluator, as `evaluator/metric`."""
  out = {}
  for name, evaluator in exp.evals.items():
    if isinstance(evaluator, InRun):
      evaluator = evaluator.in_run(workdir, name)
    found = evaluator.run(exp.objective, params, seed=exp.seed, mesh=mesh)
    out |= {f'{name}/{metric}': value for metric, value in found.items()}
  return out


class _Loop:
  """Do what is done around the steps: feed, record, report, evaluate."""

  def __init__(self, exp: Experiment, workdir: str, mesh, writer):
    self.exp, self.workdir, self.mesh, self.writer = exp, workdir, mesh, writer
    self.meter = metrics_lib.ThroughputMeter(exp.batch_size)
    self._buffer = metrics_lib.MetricBuffer()
    self._finite: list[tuple[int, jax.Array]] = []
    self._waiting: list[tuple[int, jax.Array]] = []
    self._skipped_in_a_row = 0
    self._source: Any = None

  def batches(self, start: int) -> Iterator[base.Batch]:
    """Yield global device arrays from step `start` on."""
    index, count = sharding.process_slot(self.mesh)
    self._source = self.exp.data.train.train_batches(
      self.exp.batch_size,
      seed=self.exp.seed,
      start_step=start,
      process_index=index,
      process_count=count,
      workers=self.exp.data.workers,
    )
    objective = self.exp.objective
    checks = isinstance(objective, base.Checks)
    for batch in self._source:
      if checks:
        objective.check(batch)
      yield sharding.put_batch(batch, self.mesh)

  def record(self, step: int, metrics: dict[str, Any]) -> None:
    """Keep the metrics of a step on the device."""
    self._finite.append((step, metrics.pop('finite')))
    self._buffer.append(step, metrics)
    self.meter.step()

  def report(self, *, last: bool) -> None:
    """Write the previous interval; on the last call also the rest."""
    speed = {
      **self.meter.flush(),
      **metrics_lib.device_memory(),
      'replaced_videos': float(self._source.stats.replaced),
    }
    if (previous := self._buffer.flush()) is not None:
      self._write(*previous, speed)
    self._waiting, self._finite = self._finite, []
    if last and (rest := self._buffer.drain()) is not None:
      self._write(*rest, speed)

  def evaluate(self, step: int, state: step_lib.TrainState) -> None:
    """Run the evaluators and draw what the model does."""
    with self.meter.paused():
      params = self.exp.eval_params(state)
      values = run_evals(self.exp, params, self.mesh, self.workdir)
      if values:
        self.writer.scalars(step, values)
      self._draw(step, params, state.extra)

  def _write(self, step: int, values: dict[str, float], speed) -> None:
    if values['skipped'] > 0:
      self._check_skipped()
    else:
      self._skipped_in_a_row = 0
    lr = self.exp.optim.lr_at(step - 1, self.exp.total_steps)
    self.writer.scalars(step, {**values, 'lr': float(lr), **speed})

  def _check_skipped(self) -> None:
    """Count the steps without finite gradients; stop at the limit."""
    for step, leaves in self._waiting:
      finite = np.asarray(leaves)
      if finite.all():
        self._skipped_in_a_row = 0
        continue
      self._skipped_in_a_row += 1
      paths = self.exp.param_paths()
      at_fault = [p for p, ok in zip(paths, finite, strict=True) if not ok]
      named = ', '.join(at_fault[:5])
      logging.warning(
        'Step %d was skipped: no finite gradient for %s (%d of %d leaves).',
        step,
        named,
        len(at_fault),
        len(paths),
      )
      if self._skipped_in_a_row >= self.exp.max_skipped:
        raise NonFiniteError(
          f'{self._skipped_in_a_row} steps in a row up to {step} had no '
          f'finite gradient for {len(at_fault)} parameters ({named}, ...); '
          'the state is that of the last finite step. Lower config.optim.lr, '
          'set config.optim.clip_norm, or allow more with config.max_skipped'
        )

  def _draw(self, step: int, params, extra) -> None:
    objective = self.exp.objective
    if not isinstance(objective, base.Visualises):
      return
    shown = self.exp.data.val or self.exp.data.train
    index, count = sharding.process_slot(self.mesh)
    with shown.eval_batches(
      self.exp.batch_size,
      seed=self.exp.seed,
      process_index=index,
      process_count=count,
    ) as batches:
      batch = next(batches)
    videos = reconstruct.reconstruct(
      objective,
      params,
      extra,
      sharding.put_batch(batch, self.mesh),
      jax.random.key(self.exp.seed),
    )
    if videos:
      self.writer.videos(step, videos)


def _watchdog(exp: Experiment):
  if not exp.watchdog_s:
    return contextlib.nullcontext(_Silent())
  return runtime.Watchdog(exp.watchdog_s)


def _profiler(exp: Experiment, workdir: str):
  if exp.profile is None:
    return contextlib.nullcontext(_Silent())
  return contextlib.closing(
    runtime.Profiler(f'{workdir}/profile', *exp.profile)
  )


class _Silent:
  """Stand in for a tool that the config leaves off."""

  def beat(self, step: int) -> None:
    """Do nothing."""

  def step(self, step: int) -> None:
    """Do nothing."""


def _record(
  workdir: str, config: config_lib.ConfigDict | None
) -> dict[str, Any]:
  """Write the resolved config; return what checkpoints remember of it."""
  if config is None:
    return {}
  text = config_lib.to_text(config)
  if jax.process_index() == 0:
    pathlib.Path(workdir, 'config.txt').write_text(text)
  return {'fingerprint': config_lib.fingerprint(config), 'config': text}


def _tell_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
  """Name the values that differ from those the checkpoint was made with."""
  if then.get('fingerprint') == now.get('fingerprint'):
    return
  old, new = (set(info.get('config', '').splitlines()) for info in (then, now))
  logging.warning(
    'The config changed since the checkpoint:\n%s',
    '\n'.join(
      [f'  - {line}' for line in sorted(old - new)]
      + [f'  + {line}' for line in sorted(new - old)]
    ),
  )


def _results(workdir: str) -> dict[str, float]:
  """Draw the curves and sum the run up in `results.json`."""
  log = pathlib.Path(workdir, 'metrics.jsonl')
  curves = plots.read_jsonl(log)
  if not curves:
    return {}
  plots.plot_curves(curves, pathlib.Path(workdir, 'curves.png'))
  results = {f'{k}/last': float(v[-1]) for k, (_, v) in curves.items()}
  results |= {f'{k}/first': float(v[0]) for k, (_, v) in curves.items()}
  pathlib.Path(workdir, 'results.json').write_text(
    json.dumps(results, indent=1, sort_keys=True)
  )
  return results
