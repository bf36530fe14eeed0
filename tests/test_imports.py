"""Check the direction of imports and that importing does no work."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / 'vfm_jax'
# A module may import from its own rank and from those to the left of it.
RANKS = (
  ('ops',),
  ('nn',),
  ('models',),
  (
    'convert',
    'convert_features',
    'convert_umt',
    'convert_videoprism',
    'convert_vjepa',
    'load_weights',
  ),
  ('samplers', 'solvers', 'guidance', 'sampling'),
  ('objectives',),
  ('step', 'gradients', 'optim', 'schedules', 'multitask'),
  ('evals',),
  (
    'experiment',
    'ahead',
    'ahead_text',
    'levers',
    'train',
    'convert_dit',
    'convert_dmp',
    'convert_folder',
    'convert_routing',
    'convert_vae',
    'latents',
    'export',
    'comparison',
    'comparison_planes',
    'comparison_report',
    'comparison_table',
    'comparison_transfer',
    'readers',
    'released',
    'reporting',
    'study',
    'verbs',
    'verify',
  ),
  ('main',),
)
BESIDE = (
  'config',
  'sharding',
  'checkpoint',
  'metrics',
  'plots',
  'runtime',
  'data',
  'optional',
  'torch_files',
  'torch_stream',
  'trees',
  'flops',
  'describe',
  'facts',
  'fitting',
  'hlo',
  'hlo_cost',
  'kernel_cycles',
  'presets',
  'rendezvous',
  'slices',
  'topology',
)
FILES = sorted(PACKAGE.rglob('*.py'))


def room(module: str) -> str:
  """Return the first name below the package: 'vfm_jax.ops.x' -> 'ops'."""
  return module.split('.')[1]


def imported(path: pathlib.Path) -> set[str]:
  """Return the package's own modules that a file imports, at any depth."""
  out = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom):
      assert not node.level, f'{path}: relative import'
      if node.module == 'vfm_jax':
        out |= {f'vfm_jax.{a.name}' for a in node.names}
      else:
        out.add(node.module)
    elif isinstance(node, ast.Import):
      out |= {a.name for a in node.names}
  return {m for m in out if m.startswith('vfm_jax.')}


def rank(name: str) -> int:
  return next(i for i, names in enumerate(RANKS) if name in names)


@pytest.mark.parametrize(
  'path', FILES, ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_direction(path):
  if path.parent == PACKAGE and path.stem == '__init__':
    assert not imported(path)
    return
  here = path.relative_to(PACKAGE).parts[0].removesuffix('.py')
  for module in imported(path):
    there = room(module)
    if here in BESIDE:
      assert there in BESIDE, (
        f'{path} imports {module}: {here} stands beside the line'
      )
    elif there not in BESIDE:
      assert rank(there) <= rank(here), f'{path} imports {module}: wrong way'


def test_nothing_imports_recipes():
  for path in FILES:
    assert 'configs' not in {m.split('.')[0] for m in imported(path)}


def test_importing_needs_no_optional_package_and_starts_no_device():
  """Import each module with TensorFlow, torch and tfds made unimportable."""
  modules = [
    '.'.join(('vfm_jax', *p.relative_to(PACKAGE).with_suffix('').parts))
    for p in FILES
    if p.stem != '__init__'
  ]
  program = (
    'import sys\n'
    "for m in ('tensorflow', 'torch', 'tensorflow_datasets', 'wandb',"
    " 'pybullet'): sys.modules[m] = None\n"
    'import importlib\n'
    f'for m in {modules!r}: importlib.import_module(m)\n'
    'from jax._src import xla_bridge\n'
    'assert not xla_bridge.backends_are_initialized()\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
