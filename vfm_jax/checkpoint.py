"""Save and restore the whole state of a run, on any mesh.

A checkpoint is one Orbax item with every leaf of the state under its path,
and one small JSON item that says what the leaves are and what made them. The
layout on disk knows nothing of the mesh that wrote it. A checkpoint appears
under its final name by one atomic rename, so that a run killed at any moment
leaves the last finished checkpoint as the latest.
"""

import contextlib
import importlib.metadata
import pathlib
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from vfm_jax import trees

PyTree = Any
Table = Mapping[str, tuple[tuple[int, ...], str]]

_PACKAGES = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
# Steps between agreements of the processes on whether the time has come.
_AGREE_EVERY = 50


class CheckpointError(RuntimeError):
  """Say in one message why a checkpoint can't be written or read."""


class Checkpointer:
  """Keep the checkpoints of one run in one directory.

  The last `keep_last` are kept for restarts; those at multiples of
  `keep_every_steps` are kept for ever.
  """

  def __init__(
    self,
    directory: str,
    *,
    every_steps: int | None = 1000,
    every_minutes: float | None = None,
    keep_last: int = 3,
    keep_every_steps: int | None = None,
    asynchronous: bool = True,
    info: Mapping[str, Any] | None = None,
    read_only: bool = False,
  ):
    """Open a directory, make it if needed, and drop unfinished saves in it.

    Args:
      directory: where the checkpoints of the run are.
      every_steps: save at multiples of this.
      every_minutes: save when this much time has passed since the last.
      keep_last: number of latest checkpoints to keep, at least 1.
      keep_every_steps: save and keep for ever at multiples of this.
      asynchronous: write in the background while training goes on.
      info: JSON-like facts to store with each, as the config's fingerprint.
      read_only: touch nothing, for a run that may still be going on.

    Raises:
      CheckpointError: the directory can't be made or read.
    """
    if keep_last < 1:
      raise ValueError(f'config.checkpoint.keep_last={keep_last}: at least 1')
    self._directory = pathlib.Path(directory).absolute()
    self._every_steps = every_steps
    self._every_seconds = None if every_minutes is None else every_minutes * 60
    self._keep_every = keep_every_steps
    self._info = dict(info or {})
    self._last_time = time.monotonic()
    policies = ocp.checkpoint_managers
    kept: list[Any] = [policies.LatestN(keep_last)]
    if keep_every_steps:
      kept.append(policies.EveryNSteps(keep_every_steps))
    with self._explained('open'):
      self._manager = ocp.CheckpointManager(
        self._directory,
        item_handlers={
          'state': ocp.PyTreeCheckpointHandler(),
          'info': ocp.JsonCheckpointHandler(),
        },
        options=ocp.CheckpointManagerOptions(
          preservation_policy=policies.AnyPreservationPolicy(kept),
          enable_async_checkpointing=asynchronous,
          cleanup_tmp_directories=not read_only,
          create=not read_only,
          read_only=read_only,
        ),
      )

  def __enter__(self) -> 'Checkpointer':
    return self

  def __exit__(self, kind, error, trace) -> None:
    # An error on the way out must not hide the one that ends the run.
    if kind is None:
      self.close()
    else:
      with contextlib.suppress(CheckpointError):
        self.close()

  def should_save(self, step: int) -> bool:
    """Say whether a save is due; the same on every process.

    Raises:
      CheckpointError: a save in the background has failed.
    """
    with self._explained('save'):
      self._manager.check_for_errors()
    for every in (self._every_steps, self._keep_every):
      if every and step % every == 0:
        return True
    if self._every_seconds is None:
      return False
    due = time.monotonic() - self._last_time >= self._every_seconds
    if jax.process_count() == 1:
      return due
    # Clocks differ: process 0 decides, at steps that all pass through.
    return step % _AGREE_EVERY == 0 and bool(
      multihost_utils.broadcast_one_to_all(np.asarray(due))
    )

  def save(self, step: int, state: PyTree, *, force: bool = False) -> bool:
    """Save the state if `should_save(step)` or `force`; say whether it did.

    Returns when the state is copied: its buffers may be donated. A step that
    is saved already is left as it is.

    Raises:
      CheckpointError: this save or an earlier one in the background failed.
    """
    if not (force or self.should_save(step)):
      return False
    with self._explained('save'):
      self._manager.check_for_errors()
      if step in self._manager.all_steps():
        return False
      leaves = _leaves(state)
      info = {
        **self._info,
        'packages': {p: importlib.metadata.version(p) for p in _PACKAGES},
        'leaves': {
          path: [list(x.shape), str(x.dtype)] for path, x in leaves.items()
        },
      }
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(_nested(leaves)),
          info=ocp.args.JsonSave(info),
        ),
        force=True,
      )
    self._last_time = time.monotonic()
    return True

  def latest_step(self) -> int | None:
    """Return the step of the last finished checkpoint, None without one."""
    return max(self.all_steps(), default=None)

  def all_steps(self) -> list[int]:
    """Return the steps of the finished checkpoints, in order."""
    with self._explained('read'):
      self._manager.reload()
      return sorted(self._manager.all_steps())

  def restore(
    self,
    abstract: PyTree,
    shardings: PyTree | None = None,
    step: int | None = None,
  ) -> PyTree:
    """Return a saved state in the structure of `abstract`.

    Args:
      abstract: the state's shape structs, as `jax.eval_shape` gives them.
      shardings: where each leaf goes, on any mesh; by default the shardings
        of `abstract`, or one device.
      step: which checkpoint; the latest by default.

    Raises:
      CheckpointError: there is none, or it is of another model; the message
        lists leaves that are missing, extra or of another shape or type.
    """
    step = self._step(step)
    stored = _table(self._read_info(step))
    wanted = _leaves(abstract)
    _check_same(stored, _described(wanted), self._directory / str(step))
    if shardings is None:
      places = {p: getattr(x, 'sharding', None) for p, x in wanted.items()}
    else:
      places = dict(trees.path_leaves(shardings))
    with self._explained('restore'):
      leaves = _read(self._manager, step, wanted, places)
    return trees.map_with_path(lambda path, _: leaves[path], abstract)

  def read_info(self, step: int | None = None) -> dict[str, Any]:
    """Return the facts stored with a checkpoint, the latest by default."""
    return self._read_info(self._step(step))

  def wait(self) -> None:
    """Block until every save is on disk.

    Raises:
      CheckpointError: one of them failed.
    """
    with self._explained('save'):
      self._manager.wait_until_finished()
      self._manager.check_for_errors()

  def close(self) -> None:
    """Wait for saves under way and release the directory."""
    try:
      self.wait()
    finally:
      with self._explained('close'):
        self._manager.close()

  def _step(self, step: int | None) -> int:
    steps = self.all_steps()
    if not steps or (step is not None and step not in steps):
      raise CheckpointError(
        f'no checkpoint{"" if step is None else f" of step {step}"} in '
        f'{self._directory}; found steps {steps}'
      )
    return steps[-1] if step is None else step

  def _read_info(self, step: int) -> dict[str, Any]:
    with self._explained('read'):
      args = ocp.args.Composite(info=ocp.args.JsonRestore())
      return self._manager.restore(step, args=args)['info']

  @contextlib.contextmanager
  def _explained(self, verb: str) -> Iterator[None]:
    """Turn the many errors of storage into one that says what is left."""
    try:
      yield
    except CheckpointError:
      raise
    except Exception as e:  # each storage backend raises types of its own
      kept = sorted(
        int(p.name) for p in _listed(self._directory) if p.name.isdigit()
      )
      raise CheckpointError(
        f'cannot {verb} checkpoints in {self._directory}: '
        f'{type(e).__name__}: {str(e).strip().splitlines()[0][:300]}. '
        f'Finished checkpoints there: {kept or "none"}; '
        f'{_free(self._directory)}'
      ) from e


def warm_start(
  params: PyTree,
  source: str,
  *,
  step: int | None = None,
  item: str = 'params',
  mapping: Sequence[tuple[str, str]] = (),
  fresh: Sequence[str] = (),
  ignore: Sequence[str] = (),
) -> PyTree:
  """Return `params` with the values of another run's checkpoint.

  Strict both ways: each leaf of `params` is loaded or listed as fresh, each
  leaf of the source is used or listed as ignored, each pattern matches.

  Args:
    params: initialised parameters; loaded leaves take over their sharding.
    source: directory of the other run's checkpoints.
    step: which checkpoint; the latest by default.
    item: part of the state to load, `params` or `ema/<decay>`.
    mapping: (regex, replacement) pairs; the first that matches the whole path
      in the source gives the path in `params`; others keep their path.
    fresh: regexes of paths in `params` that keep their initial values.
    ignore: regexes of paths in the source that are left out.

  Raises:
    CheckpointError: one message with every path at fault.
  """
  if not pathlib.Path(source).is_dir():
    raise CheckpointError(
      f'config.warm_start: there is no directory {source}; expected the '
      'checkpoints of another run'
    )
  with Checkpointer(source, read_only=True) as saved:
    step = saved._step(step)
    table = _table(saved._read_info(step))
    prefix = f'{item}/'
    stored = {
      p.removeprefix(prefix): v
      for p, v in table.items()
      if p.startswith(prefix)
    }
    if not stored:
      raise CheckpointError(
        f'config.warm_start.item={item!r}: nothing of that name in {source}; '
        f'found {sorted({p.split("/")[0] for p in table})}'
      )
    targets = dict(trees.path_leaves(params))
    sources = _match(stored, targets, mapping, fresh, ignore, source)
    wanted = {
      prefix + path: jax.ShapeDtypeStruct(
        targets[target].shape, targets[target].dtype
      )
      for target, path in sources.items()
    }
    places = {
      prefix + path: targets[target].sharding
      for target, path in sources.items()
    }
    with saved._explained('restore'):
      leaves = _read(saved._manager, step, wanted, places)
  return trees.map_with_path(
    lambda path, leaf: (
      leaves[prefix + sources[path]] if path in sources else leaf
    ),
    params,
  )


def _match(
  stored: Table,
  targets: Mapping[str, Any],
  mapping: Sequence[tuple[str, str]],
  fresh: Sequence[str],
  ignore: Sequence[str],
  source: str,
) -> dict[str, str]:
  """Return {target path: source path}, or raise with every offence."""
  found: dict[str, str] = {}
  errors: list[str] = []
  used: set[str] = set()

  def first(patterns: Sequence[str], path: str) -> str | None:
    pattern = next((p for p in patterns if re.fullmatch(p, path)), None)
    if pattern is not None:
      used.add(pattern)
    return pattern

  for path, (shape, _) in stored.items():
    if first(ignore, path) is not None:
      continue
    pattern = first([m[0] for m in mapping], path)
    name = path
    if pattern is not None:
      name = re.sub(pattern, dict(mapping)[pattern], path)
    if name not in targets or first(fresh, name) is not None:
      errors.append(
        f'{path} -> {name}: no such parameter to load (map or ignore it)'
      )
    elif name in found:
      errors.append(f'{path} -> {name}: loaded already from {found[name]}')
    elif shape != tuple(targets[name].shape):
      errors.append(
        f'{path} -> {name}: {list(shape)} there, {list(targets[name].shape)} '
        'here'
      )
    else:
      found[name] = path
  for name in targets:
    wrong = any(f' -> {name}:' in e for e in errors)
    if name not in found and not wrong and first(fresh, name) is None:
      errors.append(f'{name}: not in the source (map it or list it as fresh)')
  patterns = [*(m[0] for m in mapping), *fresh, *ignore]
  errors += [
    f'pattern {p!r} matches nothing' for p in patterns if p not in used
  ]
  if errors:
    raise CheckpointError(
      f'config.warm_start does not fit {source}:\n  ' + '\n  '.join(errors)
    )
  return found


def _read(
  manager: ocp.CheckpointManager,
  step: int,
  wanted: Mapping[str, Any],
  places: Mapping[str, jax.sharding.Sharding | None],
) -> dict[str, jax.Array]:
  """Read leaves of the state straight into their shardings."""
  alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  args = {
    path: ocp.ArrayRestoreArgs(
      restore_type=jax.Array,
      dtype=leaf.dtype,
      sharding=places[path] or alone,
      global_shape=leaf.shape,
    )
    for path, leaf in wanted.items()
  }
  state = manager.restore(
    step,
    args=ocp.args.Composite(
      state=ocp.args.PyTreeRestore(
        _nested(wanted), restore_args=_nested(args), partial_restore=True
      )
    ),
  )['state']
  return dict(trees.path_leaves(state))


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Return {'a/b': x} as {'a': {'b': x}}."""
  root: dict[str, Any] = {}
  for path, leaf in leaves.items():
    *parents, name = path.split('/')
    node = root
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return root


def _leaves(state: PyTree) -> dict[str, Any]:
  """Return the leaves by path; typed PRNG keys are refused."""
  leaves = dict(trees.path_leaves(state))
  keys = [
    path
    for path, x in leaves.items()
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  ]
  if keys:
    raise CheckpointError(
      f'{keys} are typed PRNG keys; keep jax.random.key_data(key) in the '
      'state and wrap it where it is used'
    )
  return leaves


def _described(leaves: Mapping[str, Any]) -> Table:
  return {p: (tuple(x.shape), str(x.dtype)) for p, x in leaves.items()}


def _table(info: Mapping[str, Any]) -> Table:
  return {p: (tuple(s), d) for p, (s, d) in info['leaves'].items()}


def _check_same(stored: Table, wanted: Table, where: pathlib.Path) -> None:
  """Raise one error that lists how the two states differ."""
  # Parameters first: the moments and averages only repeat what differs.
  wanted = dict(
    sorted(wanted.items(), key=lambda x: not x[0].startswith('params/'))
  )
  both = [p for p in wanted if p in stored]
  differences = {
    'missing in the checkpoint': [p for p in wanted if p not in stored],
    'only in the checkpoint': [p for p in stored if p not in wanted],
    'of another shape or type (there, here)': [
      f'{p}: {_shown(stored[p])}, {_shown(wanted[p])}'
      for p in both
      if stored[p] != wanted[p]
    ],
  }
  lines = []
  for title, items in differences.items():
    if items:
      lines.append(f'{len(items)} {title}:')
      lines += [f'  {item}' for item in items[:8]]
      if len(items) > 8:
        lines.append(f'  and {len(items) - 8} more')
  if lines:
    raise CheckpointError(
      f'{where} is of another model or optimizer; change config.objective, '
      'config.optim or config.ema to match, or use another --workdir:\n'
      + '\n'.join(lines)
    )


def _shown(entry: tuple[tuple[int, ...], str]) -> str:
  return f'{entry[1]}{list(entry[0])}'


def _listed(directory: pathlib.Path) -> list[pathlib.Path]:
  return list(directory.iterdir()) if directory.is_dir() else []


def _free(directory: pathlib.Path) -> str:
  """Say how much space is left where a directory is or would be."""
  real = next(p for p in (directory, *directory.parents) if p.exists())
  return f'{shutil.disk_usage(real).free / 2**30:.1f} GiB free on its disk'
