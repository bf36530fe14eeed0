"""Compare with numbers that the reference implementations gave.

A case is a sidecar `<case>.json` and its arrays `<case>.npz`. The function
`run_<case>(meta, arrays)` of any `runners_*.py` next to this file returns what
this library computes for every `out/`, `out64/`, `grad/` and `gradnorm/` array.
"""

import importlib.util
import json
import pathlib
import re

import numpy as np
import pytest

CHECKED = ('out/', 'out64/', 'grad/', 'gradnorm/')


def load_runners() -> dict:
  runners = {}
  for path in sorted(pathlib.Path(__file__).parent.glob('runners_*.py')):
    spec = importlib.util.spec_from_file_location(f'golden_{path.stem}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in vars(module).items():
      if name.startswith('run_'):
        runners[name.removeprefix('run_')] = value
  return runners


RUNNERS = load_runners()


def find(case: str):
  """Return the runner whose name is the longest start of the case's."""
  names = [n for n in RUNNERS if re.match(rf'{n}(_|$)', case)]
  return RUNNERS[max(names, key=len)] if names else None


def tolerance(meta: dict, name: str, expected: np.ndarray) -> dict:
  """Return rtol and atol of an array.

  Where the sidecar gives an array's own pair, that is it. Elsewhere a gradient
  is compared relative to the largest entry of its array: its small entries are
  differences of large terms.
  """
  own = meta['arrays'].get(name, {})
  if 'rtol' in own and 'atol' in own:
    return dict(rtol=own['rtol'], atol=own['atol'])
  shared = meta['tolerance'].get('default', meta['tolerance'])
  rtol, atol = shared['rtol'], shared['atol']
  if name.startswith('grad'):
    rtol = max(rtol, 1e-4)
    return dict(rtol=rtol, atol=rtol * np.abs(expected).max(initial=0.0))
  if isinstance(atol, str):
    atol = 1e-5
  return dict(rtol=rtol, atol=own.get('suggest_atol', atol))


def test_recorded_case(golden_case):
  meta = json.loads(golden_case.read_text())
  runner = find(meta['case'])
  if runner is None:
    pytest.skip(f'no runner for {meta["case"]}')
  with np.load(golden_case.with_suffix('.npz'), allow_pickle=False) as file:
    arrays = dict(file)
  computed = runner(meta, arrays)
  expected = {k: v for k, v in arrays.items() if k.startswith(CHECKED)}
  unchecked = sorted(set(expected) - set(computed))
  assert not unchecked, f'the runner does not compute {unchecked}'
  failures = []
  for name, value in expected.items():
    got = np.asarray(computed[name])
    try:
      if value.dtype.kind == 'f':
        allowed = tolerance(meta, name, value)
        np.testing.assert_allclose(got.reshape(value.shape), value, **allowed)
      else:
        np.testing.assert_array_equal(got, value)
    except (AssertionError, ValueError) as e:
      failures.append(f'{name}: {e}')
  assert not failures, '\n'.join(failures)
