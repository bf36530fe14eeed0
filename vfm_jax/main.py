"""Turn flags into a config and a config into one verb.

python -m vfm_jax.main
  [train|eval|embed|sample|latents|describe|convert|export|report|study]
  --config=configs/quickstart.py[:variant] [--config.a.b=value ...]
  [--workdir=DIR]
"""

import json
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import cast, get_args

from absl import app, flags, logging
from ml_collections import config_flags

from vfm_jax import comparison as comparison_lib
from vfm_jax import (
  comparison_report,
  reporting,
  runtime,
  study,
  topology,
  train,
  verbs,
)
from vfm_jax import config as config_lib
from vfm_jax import facts as facts_lib
from vfm_jax import verify as verify_lib
from vfm_jax.checkpoint import CheckpointError
from vfm_jax.comparison import Comparison
from vfm_jax.data.latents import Dtype
from vfm_jax.data.pipeline import TooManyBadVideos
from vfm_jax.evals.report_planes import Axes
from vfm_jax.evals.store import Sampling
from vfm_jax.evals.stored import StoredEvaluation
from vfm_jax.experiment import Experiment
from vfm_jax.export import Format

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Recipe, with :variant if it has any.', lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where results go; runs/<recipe> by default.'
)
_SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'study: seeds to run.')
_DEVICES = flags.DEFINE_integer(
  'devices', None, 'describe: number of devices to lay the run out for.'
)
_TOPOLOGY = flags.DEFINE_string(
  'topology',
  None,
  'describe: compile the step for a machine, as in v5e:16x16 or h200:8.',
)
_SCHEDULES = flags.DEFINE_string(
  'schedules', None, 'describe: table of the cycles of kernels (JSON).'
)
_LEVERS = flags.DEFINE_bool(
  'levers', False, 'describe: also compile what would take less memory.'
)
_DATASET = flags.DEFINE_string('dataset', 'dataset', 'embed: its name.')
_SAMPLING = flags.DEFINE_enum(
  'sampling', 'uniform', get_args(Sampling), 'embed: clips of a video.'
)
_ANNOTATION = flags.DEFINE_string(
  'annotation', None, 'embed: the label that is written as the class.'
)
_COUNT = flags.DEFINE_integer('count', 64, 'sample: how many to draw.')
_LABELS = flags.DEFINE_list(
  'labels', None, 'sample: labels to draw in turn; all of them by default.'
)
_SOURCE = flags.DEFINE_string(
  'source', None, 'convert: file or folder of weights.'
)
_ENTRY = flags.DEFINE_string(
  'entry', None, 'convert: entry of a torch file with the weights, as in ema.'
)
_VERIFY = flags.DEFINE_bool(
  'verify', False, 'convert: check every tensor and what was written.'
)
_WEIGHTS = flags.DEFINE_string(
  'weights', None, 'export: params, or an average as in ema/0.9999.'
)
_FORMAT = flags.DEFINE_enum(
  'format', 'released', get_args(Format), 'export: names of the tensors.'
)
_OUT = flags.DEFINE_string(
  'out',
  None,
  'export: file, or folder for --format=diffusers; describe: file (JSON).',
)
_VAE = flags.DEFINE_string(
  'vae', None, 'latents: folder of the autoencoder, as diffusers saves it.'
)
_SHARDS = flags.DEFINE_integer('shards', 1, 'latents: files of a split.')
_FLIPS = flags.DEFINE_bool('flips', True, 'latents: also mirror images.')
_LATENT_DTYPE = flags.DEFINE_enum(
  'latent_dtype', 'float16', get_args(Dtype), 'latents: type in the files.'
)
_LATENT_BATCH = flags.DEFINE_integer(
  'latent_batch', None, 'latents: examples at a time; the batch by default.'
)
_EVALUATE = flags.DEFINE_bool(
  'evaluate', True, 'report: evaluate first; else show the results there are.'
)
_MODEL = flags.DEFINE_string(
  'model', None, 'report: name of the encoder; that of the workdir by default.'
)
_RUNS = flags.DEFINE_list(
  'runs', [], 'report: MODEL=WORKDIR of further runs; seeds share a MODEL.'
)
_APPEARANCE = flags.DEFINE_string(
  'appearance', '', 'report: regex of metrics told by appearance, as in scene.'
)
_MOTION = flags.DEFINE_string(
  'motion', '', 'report: regex of metrics told by motion, as in direction.'
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'host:port of process 0, where it is not found alone.'
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'With it.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'With it.')

# What a user can cause and mend: told in one message, without a traceback.
# Errors of configs, shapes, layouts and weights are ValueErrors.
_EXPECTED = (
  ValueError,
  OSError,
  CheckpointError,
  TooManyBadVideos,
  train.NonFiniteError,
  comparison_lib.Interrupted,
  runtime.StartError,
)
_TRACEBACK = flags.DEFINE_bool(
  'traceback', False, 'Show where an error was raised.'
)


def main(argv: Sequence[str]) -> None:
  """Run the verb that is named first, `train` by default."""
  verb = argv[1] if len(argv) > 1 else 'train'
  if verb not in _VERBS or len(argv) > 2:
    raise app.UsageError(
      f'one verb of {", ".join(_VERBS)}; found {" ".join(argv[1:])!r}'
    )
  if _CONFIG.value is None:
    raise app.UsageError('--config=configs/RECIPE.py is needed')
  # The libraries below tell a lot at INFO; what a user must know is a warning.
  logging.set_verbosity(logging.WARNING)
  config = _CONFIG.value
  exp = config_lib.build(config)
  if isinstance(exp, Comparison) and verb != 'study':
    raise config_lib.ConfigError(
      'config: a Comparison is for the verb study; for others choose one of '
      f'its recipes, as in :{exp.arms[0].name}'
    )
  if isinstance(exp, StoredEvaluation) and verb not in ('eval', 'report'):
    raise config_lib.ConfigError(
      'config: a StoredEvaluation is for the verbs eval and report, found '
      f'{verb}'
    )
  if not isinstance(exp, Experiment | Comparison | StoredEvaluation):
    raise config_lib.ConfigError(
      'config: the recipe must return ref(Experiment, ...), for the verb study '
      'ref(Comparison, ...), or for eval and report ref(StoredEvaluation, '
      f'...), found {type(exp).__name__}'
    )
  if verb not in ('describe', 'study'):
    trained = exp if verb == 'train' and isinstance(exp, Experiment) else None
    runtime.initialize(
      _COORDINATOR.value,
      _NUM_PROCESSES.value,
      _PROCESS_ID.value,
      facts={
        'config': config_lib.to_text(config),
        'workdir': f'--workdir={_workdir()}',
        **facts_lib.packages(),
        **(facts_lib.data(trained.data) if trained else {}),
      },
    )
  with runtime.shared_fate():
    _VERBS[verb](exp, _workdir(), config)


def cli() -> None:
  """Parse the command line and run; errors that users can mend exit with 1."""
  try:
    app.run(main)
  except (AttributeError, KeyError) as e:
    # ml_collections raises these for an override of a key that is not there.
    if '--config.' not in ' '.join(sys.argv):
      raise
    _fail(e)
  except _EXPECTED as e:
    if _TRACEBACK.value:
      raise
    _fail(e)


def _fail(error: BaseException) -> None:
  print(f'{type(error).__name__}: {error}', file=sys.stderr)
  sys.exit(1)


def _workdir() -> str:
  if _WORKDIR.value:
    return _WORKDIR.value
  recipe = config_flags.get_config_filename(flags.FLAGS['config'])
  name = os.path.basename(recipe).split(':')[0].removesuffix('.py')
  return os.path.join('runs', name)


def _train(exp: Experiment, workdir: str, config) -> None:
  _keep_compiled(workdir)
  train.train(exp, workdir, config=config)


def _keep_compiled(workdir: str) -> None:
  """Let a resumed run and the next seed of a study start without compiling."""
  train.check_writable(workdir)
  if not os.environ.get('JAX_COMPILATION_CACHE_DIR'):
    runtime.compilation_cache(os.path.join(workdir, 'compiled'))


def _eval(exp: Experiment | StoredEvaluation, workdir: str, config) -> None:
  del config
  if isinstance(exp, StoredEvaluation):
    found = exp.run(workdir)
  else:
    found = verbs.evaluate(exp, workdir)
  print(json.dumps(found, indent=1, sort_keys=True))


def _embed(exp: Experiment, workdir: str, config) -> None:
  del config
  written = verbs.embed(
    exp,
    workdir,
    dataset=_DATASET.value,
    sampling=cast(Sampling, _SAMPLING.value),
    annotation=_ANNOTATION.value,
  )
  print(json.dumps(written, indent=1, sort_keys=True))


def _sample(exp: Experiment, workdir: str, config) -> None:
  del config
  labels = None if _LABELS.value is None else [int(y) for y in _LABELS.value]
  written = verbs.sample(exp, workdir, count=_COUNT.value, labels=labels)
  print(json.dumps({k: str(v) for k, v in written.items()}, indent=1))


def _latents(exp: Experiment, workdir: str, config) -> None:
  del config
  if not _VAE.value:
    raise app.UsageError('latents needs --vae=DIR')
  written = verbs.latents(
    exp,
    workdir,
    _VAE.value,
    batch_size=_LATENT_BATCH.value,
    num_shards=_SHARDS.value,
    flips=_FLIPS.value,
    dtype=cast(Dtype, _LATENT_DTYPE.value),
  )
  print(json.dumps(written, indent=1, sort_keys=True))


def _describe(exp: Experiment, workdir: str, config) -> None:
  del workdir
  if _TOPOLOGY.value:
    # The compiler of an accelerator would bring it up, or look for it.
    topology.stay_on_cpu()
    found = verbs.describe_ahead(
      exp,
      _TOPOLOGY.value,
      schedules=_SCHEDULES.value,
      with_levers=_LEVERS.value,
    )
  else:
    print(config_lib.to_text(config))
    found = verbs.describe(exp, num_devices=_DEVICES.value)
  print(found.text)
  if _OUT.value:
    pathlib.Path(_OUT.value).write_text(json.dumps(found.data, indent=1))
  if not found.data.get('fits', True):
    sys.exit(1)


def _convert(exp: Experiment, workdir: str, config) -> None:
  del config
  if not _SOURCE.value:
    raise app.UsageError('convert needs --source=FILE')
  done = verbs.convert(
    exp, workdir, _SOURCE.value, entry=_ENTRY.value, verify=_VERIFY.value
  )
  if done.checks:
    print(verify_lib.table(done.checks))
  entry = f' of the entry {done.entry!r}' if done.entry else ''
  print(
    f'{done.num_params:,} parameters{entry} of {_SOURCE.value} written to '
    f'{workdir}/checkpoints/0'
  )


def _export(exp: Experiment, workdir: str, config) -> None:
  del config
  done = verbs.export(
    exp,
    workdir,
    _OUT.value,
    weights=_WEIGHTS.value,
    layout=cast(Format, _FORMAT.value),
  )
  print(
    f'{done.weights} of step {done.step}: {done.num_values:,} numbers in '
    f'{done.num_tensors} tensors written to {done.path}'
  )


def _study(exp: Experiment | Comparison, workdir: str, config) -> None:
  _keep_compiled(workdir)
  seeds = [int(s) for s in _SEEDS.value]
  if isinstance(exp, Comparison):
    outcomes = comparison_lib.run(exp, config, workdir, seeds)
    print(comparison_report.write(exp, outcomes, workdir, seeds))
  else:
    print(study.study(config, workdir, seeds))


def _report(exp: Experiment | StoredEvaluation, workdir: str, config) -> None:
  del config
  if not all('=' in run for run in _RUNS.value):
    raise app.UsageError(f'--runs takes MODEL=WORKDIR, found {_RUNS.value}')
  parts = [run.partition('=') for run in _RUNS.value]
  page = reporting.write(
    exp if _EVALUATE.value else None,
    workdir,
    model=_MODEL.value or os.path.basename(os.path.normpath(workdir)),
    runs=[(name, folder) for name, _, folder in parts],
    axes=Axes(_APPEARANCE.value, _MOTION.value),
    sampling=cast(Sampling, _SAMPLING.value),
  )
  print(page)


_VERBS: dict[str, Callable[..., None]] = {
  'train': _train,
  'eval': _eval,
  'embed': _embed,
  'sample': _sample,
  'latents': _latents,
  'describe': _describe,
  'convert': _convert,
  'export': _export,
  'report': _report,
  'study': _study,
}

if __name__ == '__main__':
  cli()
