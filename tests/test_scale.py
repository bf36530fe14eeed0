"""Compile the large recipes for whole pods and hold what docs/scale.md says."""

import importlib.util
import json
import pathlib

import jax
import pytest

from vfm_jax import config, topology, verbs

ROOT = pathlib.Path(__file__).parents[1]
ROWS = json.loads(pathlib.Path(__file__).with_name('scale.json').read_text())
COMPILERS = {'tpu': 'libtpu', 'gpu': 'jax_cuda13_plugin'}
# Bytes of a device of v5e that a step may take at its peak.
V5E = 15 * 2**30


@pytest.mark.ahead
@pytest.mark.slow
@pytest.mark.parametrize(
  'row', ROWS, ids=[f'{r["recipe"]}-{r["target"]}' for r in ROWS]
)
def test_a_step_fits_and_sends_as_recorded(row):
  """Each compiles for minutes; `-k` takes one."""
  target = topology.parse(row['target'])
  if not importlib.util.find_spec(COMPILERS[target.platform]):
    pytest.skip(f'needs the compiler of {target.platform}s')
  recipe = config.load(f'{ROOT}/configs/{row["recipe"]}')
  recipe.batch_size = row['batch_size']
  found = verbs.describe_ahead(config.build(recipe), row['target']).data
  assert found['fits']
  assert found['need'] < 1.1 * row['peak']
  if row['target'].startswith('v5e'):
    assert found['need'] <= V5E
  assert set(found['remat']) <= {'none', 'dots'}
  # Tokens are never gathered: labels and such are small.
  for gather in found['other_gathers']:
    assert gather['bytes'] < 2**25
  runs = {kind: c['runs'] for kind, c in found['collectives'].items()}
  if jax.__version__ == row['jax']:  # another compiler may merge them otherwise
    assert runs == row['runs']
