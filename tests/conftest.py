"""Give every test eight CPU devices; set before anything imports JAX.

The compiler is told not to optimise: nearly all of a test's time is compiling,
and that halves it; where there still are two ways to emit loops, the older one
halves it again. What is compiled is kept until the tests end, for several start
the same run more than once. Processes that tests start inherit all this.
Garbage is looked for less often: tracing makes many objects, and few in cycles.
"""

import atexit
import gc
import importlib.metadata
import os
import pathlib
import shutil
import tempfile

os.environ.setdefault('JAX_NUM_CPU_DEVICES', '8')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
# Later versions have one way, and stop at a flag that they do not know.
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  os.environ['XLA_FLAGS'] = ' '.join(
    [os.environ.get('XLA_FLAGS', ''), '--xla_cpu_use_fusion_emitters=false']
  )
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  _compiled = tempfile.mkdtemp(prefix='compiled-')
  atexit.register(shutil.rmtree, _compiled, ignore_errors=True)
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _compiled

import pytest
from absl import flags

gc.set_threshold(200_000, 50, 1000)
GOLDEN = pathlib.Path(__file__).parent / 'golden'


def pytest_addoption(parser):
  parser.addoption(
    '--golden-dir',
    action='append',
    default=None,
    help='folder of recorded cases (.json with .npz); may be repeated; '
    'default: tests/golden',
  )
  parser.addoption(
    '--update-golden',
    action='store_true',
    help='record the config texts of the recipes anew',
  )


def pytest_generate_tests(metafunc):
  """Make one test of each recorded case."""
  if 'golden_case' in metafunc.fixturenames:
    folders = metafunc.config.getoption('--golden-dir') or [GOLDEN]
    paths = [p for f in folders for p in sorted(pathlib.Path(f).glob('*.json'))]
    metafunc.parametrize('golden_case', paths, ids=[p.name for p in paths])


@pytest.fixture(scope='session')
def parsed_flags():
  """Parse absl's flags: the worker processes of grain need them."""
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(['pytest'], known_only=True)
  return flags.FLAGS
