"""Submit a training to Slurm with submitit: one process a GPU.

    python launch/submit_slurm.py --config FILE[:variant] --workdir DIR \
      [--dry] [--nodes N] [--gpus N] [--cpus N] [--hours H] [--partition P] \
      [--cache DIR] [-- --config.a.b=value ...]

Needs the extra `slurm`. A job that is preempted, or comes to its time limit,
saves a checkpoint, is submitted again and goes on from there. `--dry` prints
the options and the command of each process, and submits nothing.
"""

import argparse
import dataclasses
import os
import pathlib
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

# Seconds that a process has to save and leave after it is asked to.
GRACE_S = 240


@dataclasses.dataclass
class Training:
  """Run one process of a training; submitit pickles this.

  Attributes:
    command: of the process; JAX finds the others in Slurm's variables.
    environment: variables to add.
    folder: of the project.
  """

  command: tuple[str, ...]
  environment: dict[str, str]
  folder: str

  def __call__(self) -> None:
    """Run until the training ends.

    Raises:
      CalledProcessError: it failed, which ends the other processes too.
    """
    environment = {**os.environ, **self.environment}
    self._process = subprocess.Popen(
      self.command, cwd=self.folder, env=environment
    )
    if status := self._process.wait():
      raise subprocess.CalledProcessError(status, self.command)

  def checkpoint(self) -> Any:
    """Let the process save and leave; return what to submit in its place."""
    import submitit

    self._process.send_signal(signal.SIGTERM)
    self._process.wait(GRACE_S)
    again = Training(self.command, self.environment, self.folder)
    return submitit.helpers.DelayedSubmission(again)


def main(argv: Sequence[str]) -> None:
  """Submit, or print what would be submitted."""
  args, rest = _parse(argv)
  options = dict(
    name='vfm_jax',
    nodes=args.nodes,
    tasks_per_node=args.gpus,
    gpus_per_node=args.gpus,
    cpus_per_task=args.cpus,
    timeout_min=60 * args.hours,
    slurm_signal_delay_s=GRACE_S + 60,
    slurm_srun_args=['--kill-on-bad-exit=1'],
  )
  if args.partition:
    options['slurm_partition'] = args.partition
  training = Training(
    command=(
      *(sys.executable, '-m', 'vfm_jax.main', 'train'),
      *(f'--config={args.config}', f'--workdir={args.workdir}', *rest),
    ),
    environment={
      'JAX_COMPILATION_CACHE_DIR': args.cache or f'{args.workdir}/compiled',
      'JAX_PLATFORMS': 'cuda',
    },
    folder=str(pathlib.Path(__file__).resolve().parents[1]),
  )
  if args.dry:
    for name, value in options.items():
      print(f'{name} = {value!r}')
    added = [f'{k}={v}' for k, v in training.environment.items()]
    print('+ ' + shlex.join(['env', *added, *training.command]))
    return
  try:
    import submitit
  except ModuleNotFoundError:
    sys.exit(
      'submitit is needed here and is not installed; install it with: '
      "pip install 'vfm_jax[slurm]'"
    )
  executor = submitit.AutoExecutor(folder=f'{args.workdir}/logs')
  executor.update_parameters(**options)
  job = executor.submit(training)
  print(f'job {job.job_id}; logs of each process: {job.paths.folder}')


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
  rest: list[str] = []
  argv = list(argv)
  if '--' in argv:
    at = argv.index('--')
    argv, rest = argv[:at], argv[at + 1 :]
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--dry', action='store_true')
  parser.add_argument('--config', required=True)
  parser.add_argument('--workdir', required=True)
  parser.add_argument('--cache')
  parser.add_argument('--partition')
  parser.add_argument('--nodes', type=int, default=1)
  parser.add_argument('--gpus', type=int, default=8, help='of a node')
  parser.add_argument('--cpus', type=int, default=8, help='of a process')
  parser.add_argument('--hours', type=int, default=24)
  return parser.parse_args(argv), rest


if __name__ == '__main__':
  main(sys.argv[1:])
