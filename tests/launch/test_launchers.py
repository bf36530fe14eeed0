"""Check what the launchers would run, and what they say when a part is missing.

Programs of the clouds are replaced by scripts that record how they are called.
"""

import os
import pathlib
import shlex
import signal
import stat
import subprocess
import sys
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
RECIPE = ('--config', 'configs/videomae_l.py:gpu8', '--workdir', '/runs/a')
POD = (
  *('--name', 'pod', '--zone', 'us-east5-a', '--type', 'v5litepod-16'),
  *('--config', 'configs/videomae_l.py', '--workdir', '~/bucket/runs/pod'),
)
GKE = (
  *('--name', 'big', '--image', 'repo/vfm:1', '--bucket', 'bkt'),
  *('--accelerator', 'tpu-v5-lite-podslice', '--topology', '4x4'),
  *('--config', 'configs/dit_xl2.py', '--workdir', '/bucket/big'),
)


@pytest.fixture
def programs(tmp_path, monkeypatch):
  """Return a function that puts a program of a name first in the PATH."""
  folder = tmp_path / 'bin'
  folder.mkdir()
  monkeypatch.setenv('PATH', f'{folder}:{os.environ["PATH"]}')

  def add(name, body):
    path = folder / name
    path.write_text(f'#!/usr/bin/env bash\n{body}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path

  return add


def launch(script, *args, **env):
  program = 'bash' if not script.endswith('.py') else sys.executable
  return subprocess.run(
    [program, str(ROOT / 'launch' / script), *args],
    capture_output=True,
    text=True,
    env={**os.environ, **env},
    timeout=60,
  )


def commands(done):
  """Return the commands that a launcher printed, as lists of words."""
  assert done.returncode == 0, done.stderr
  lines = [x[2:] for x in done.stdout.splitlines() if x.startswith('+ ')]
  return [shlex.split(line) for line in lines]


def test_one_process_for_all_gpus():
  done = launch('gpu_local.sh', '--dry', *RECIPE, '--', '--config.accum=4')
  assert commands(done) == [
    [
      *('env', 'JAX_COMPILATION_CACHE_DIR=/runs/a/compiled'),
      *('JAX_PLATFORMS=cuda', 'python', '-m', 'vfm_jax.main', 'train'),
      *('--config=configs/videomae_l.py:gpu8', '--workdir=/runs/a'),
      '--config.accum=4',
    ]
  ]


def test_several_processes_of_one_machine():
  args = ('--processes', '2', '--cache', '/c', '--port', '1234')
  first, second = commands(
    launch('gpu_local.sh', '--dry', *RECIPE, *args, GPUS='4')
  )
  assert first[1] == 'JAX_COMPILATION_CACHE_DIR=/c'
  assert 'CUDA_VISIBLE_DEVICES=0,1' in first
  assert 'CUDA_VISIBLE_DEVICES=2,3' in second
  shared = ['--coordinator=localhost:1234', '--num_processes=2']
  assert first[-3:] == [*shared, '--process_id=0']
  assert second[-3:] == [*shared, '--process_id=1']


def test_gpus_that_do_not_divide():
  done = launch('gpu_local.sh', *RECIPE, '--processes', '3', GPUS='8')
  assert done.returncode == 2
  assert '--processes 3 does not divide 8 GPUs' in done.stderr


def test_a_process_that_fails_is_named_and_ends_the_others(programs, tmp_path):
  python = programs(
    'fake_python',
    'for a; do [ "$a" = --process_id=1 ] && { echo no memory; exit 7; }; done\n'
    'trap "exit 0" TERM; sleep 30 & wait',
  )
  start = time.monotonic()
  done = launch(
    'gpu_local.sh',
    *('--config', 'c', '--workdir', str(tmp_path), '--processes', '2'),
    PYTHON=str(python),
    GPUS='2',
  )
  assert done.returncode == 7
  assert 'process 1 failed with status 7' in done.stderr
  assert 'no memory' in done.stderr
  assert time.monotonic() - start < 20


def test_slurm_runs_one_process_a_gpu():
  done = launch('slurm.sbatch', '--dry', *RECIPE, '--', '--config.seed=1')
  [words] = commands(done)
  assert words[:2] == ['srun', '--kill-on-bad-exit=1']
  assert (
    '--export=ALL,JAX_COMPILATION_CACHE_DIR=/runs/a/compiled,JAX_PLATFORMS=cuda'
  ) in words
  assert words[-3:] == [
    '--config=configs/videomae_l.py:gpu8',
    '--workdir=/runs/a',
    '--config.seed=1',
  ]
  head = (ROOT / 'launch/slurm.sbatch').read_text()
  assert '#SBATCH --requeue\n#SBATCH --signal=B:TERM@' in head


def test_slurm_queues_a_job_again_that_was_told_to_leave(programs, tmp_path):
  programs('srun', f'trap "exit 0" TERM; touch {tmp_path}/up; sleep 30 & wait')
  programs('scontrol', f'echo "$@" > {tmp_path}/asked')
  env = {**os.environ, 'SLURM_JOB_ID': '42', 'SLURM_SUBMIT_DIR': str(ROOT)}
  job = subprocess.Popen(
    ['bash', str(ROOT / 'launch/slurm.sbatch'), *RECIPE],
    env=env,
    stderr=subprocess.DEVNULL,
  )
  while not (tmp_path / 'up').exists():
    time.sleep(0.02)
  job.send_signal(signal.SIGTERM)
  assert job.wait(20) == 0
  assert (tmp_path / 'asked').read_text() == 'requeue 42\n'


def test_submitit_prints_its_options_and_command():
  args = ('--nodes', '2', '--dry', '--', '--config.seed=1')
  done = launch('submit_slurm.py', *RECIPE, *args)
  [words] = commands(done)
  assert words[:3] == [
    'env',
    'JAX_COMPILATION_CACHE_DIR=/runs/a/compiled',
    'JAX_PLATFORMS=cuda',
  ]
  assert words[-2:] == ['--workdir=/runs/a', '--config.seed=1']
  options = done.stdout.splitlines()
  assert {'nodes = 2', 'tasks_per_node = 8', 'timeout_min = 1440'} <= {*options}


def test_pod_commands():
  args = ('--bucket', 'bkt', '--spot', '--project', 'p', '--', '--config.a=1 2')
  shown = commands(launch('tpu_pod.sh', '--dry', *POD, *args))
  verbs = [' '.join(words[3:5]) for words in shown if words[0] == 'gcloud']
  assert verbs == [
    'queued-resources create',
    'queued-resources describe',
    'tpu-vm scp',
    *['tpu-vm ssh'] * 4,
    'queued-resources delete',
  ]
  assert all('--project=p' in w for w in shown if w[0] == 'gcloud')
  assert '--spot' in shown[0]
  assert '--accelerator-type=v5litepod-16' in shown[0]
  [start] = [w for w in shown if 'worker.sh' in w[-1]]
  # As the shell of a host reads it.
  assert shlex.split(start[-1].removeprefix('--command='))[6:12] == [
    *('launch/worker.sh', '~/bucket/runs/pod', '~/bucket/runs/pod/compiled'),
    *('train', '--config=configs/videomae_l.py', '--config.a=1 2'),
  ]
  assert any('gcsfuse --implicit-dirs bkt' in w[-1] for w in shown)
  assert any('--output-directory=runs/pod/logs' in w for w in shown)


# Answers of gcloud: hosts are read from a file, states from one line each.
GCLOUD = """
echo "$@" >> {at}/calls
case "$*" in
  *"queued-resources describe"*)
    [ -s {at}/states ] || {{ echo ACTIVE; exit; }}
    head -n 1 {at}/states; sed -i 1d {at}/states ;;
  *"tpu-vm describe"*) echo "10.0.0.1;10.0.0.2" ;;
  *agent-worker-number*) cat {at}/hosts ;;
esac
"""


def pod(programs, tmp_path, hosts, states=''):
  (tmp_path / 'hosts').write_text(hosts)
  (tmp_path / 'states').write_text(states)
  programs('gcloud', GCLOUD.format(at=tmp_path))
  programs('git', 'exit 0')
  args = ('--start-timeout', '0', '--restarts', '1', '--name', tmp_path.name)
  done = launch('tpu_pod.sh', *POD, *args, POLL='0.1')
  subprocess.run(['rm', '-rf', str(ROOT / 'runs' / tmp_path.name)], check=True)
  return done, (tmp_path / 'calls').read_text()


def test_pod_names_hosts_that_do_not_start(programs, tmp_path):
  done, calls = pod(programs, tmp_path, 'host 0 running\nhost 1 absent\n')
  assert done.returncode == 2
  assert 'of 2 hosts these do not run after 0 s: 1' in done.stderr
  assert '--output-directory' in calls  # logs are collected


def test_pod_ends_well(programs, tmp_path):
  done, calls = pod(programs, tmp_path, 'host 0 ended 0\nhost 1 ended 0\n')
  assert done.returncode == 0, done.stderr
  assert 'queued-resources delete' in calls


def test_pod_starts_again_where_it_was_taken_away(programs, tmp_path):
  hosts = 'host 0 ended 0\nhost 1 ended 0\n'
  # Asked for, active; then gone while the run is watched; then there again.
  states = 'ACTIVE\nACTIVE\nSUSPENDED\n'
  done, calls = pod(programs, tmp_path, hosts, states)
  assert done.returncode == 0, done.stderr
  assert 'restart 1 of 1' in done.stderr
  assert calls.count('worker.sh') == 2


def test_jobset_is_filled_in():
  args = ('--slices', '2', '--dry', '--', '--config.x="a b"')
  done = launch('gke.sh', *GKE, *args)
  shown = commands(done)
  assert [w[:2] for w in shown] == [
    ['kubectl', 'apply'],
    ['kubectl', 'get'],
    ['kubectl', 'logs'],
  ]
  text = done.stdout.split('\n+ kubectl')[0]
  spec = yaml.safe_load(text)['spec']
  [job] = spec['replicatedJobs']
  assert (job['replicas'], spec['failurePolicy']['maxRestarts']) == (2, 10)
  assert job['template']['spec']['parallelism'] == 4  # 16 chips, 4 a host
  pod = job['template']['spec']['template']['spec']
  [container] = pod['containers']
  assert container['command'][-2:] == [
    '--workdir=/bucket/big',
    '--config.x="a b"',
  ]
  env = {e['name']: e['value'] for e in container['env']}
  assert env['JAX_COMPILATION_CACHE_DIR'] == '/bucket/big/compiled'
  assert container['resources']['limits'] == {'google.com/tpu': 4}
  assert '${' not in text.split('apiVersion')[1]


def test_jobset_names_pods_that_do_not_run(programs):
  programs(
    'kubectl',
    '[ "$1" = get ] && printf "0/0 Running\\n0/1 Pending\\n0/3 Running\\n"; '
    'exit 0',
  )
  done = launch('gke.sh', *GKE, '--start-timeout', '0', POLL='0.1')
  assert done.returncode == 2
  assert 'these pods (slice/host) do not run after 0 s: 0/1 0/2' in done.stderr


@pytest.mark.parametrize(
  ('script', 'args', 'message'),
  [
    ('gpu_local.sh', ('--config', 'c'), '--workdir is needed'),
    ('slurm.sbatch', ('--workdir', 'w'), '--config is needed'),
    ('tpu_pod.sh', POD[2:], '--name is needed'),
    ('gke.sh', GKE[2:], '--name is needed'),
    ('gke.sh', (*GKE, '--chips', '3'), 'does not divide the 16 chips of 4x4'),
    ('gpu_local.sh', ('--workdri', 'w'), 'unknown argument --workdri'),
  ],
)
def test_what_is_missing_is_named(script, args, message):
  done = launch(script, '--dry', *args)
  assert done.returncode == 2
  assert message in done.stderr


@pytest.mark.parametrize(
  'script', ['gpu_local.sh', 'tpu_pod.sh', 'gke.sh', 'submit_slurm.py']
)
def test_help(script):
  done = launch(script, '--help')
  assert done.returncode == 0
  assert '--dry' in done.stdout
  assert 'set -euo' not in done.stdout
