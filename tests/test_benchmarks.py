import importlib
import json
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# A worker whose unit of work sleeps for the given seconds.
TOY = (
  'import sys, time; from benchmarks import interleave; '
  'print("noise on standard output"); '
  'interleave.serve(lambda: time.sleep({0}), warmup=1, work={1}, name="toy")'
)


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT))
  monkeypatch.setenv('PYTHONPATH', str(ROOT))


@pytest.fixture
def interleave():
  return importlib.import_module('benchmarks.interleave')


@pytest.fixture
def results():
  return importlib.import_module('benchmarks.results')


def _toy(interleave, name, seconds, work=1, env=None):
  return interleave.Contestant(
    name, ('-c', TOY.format(seconds, work)), env or {}
  )


def test_ratios_are_medians_of_the_rounds(results):
  comparison = results.Comparison(
    title='toy',
    reference='a',
    # The machine is twice as slow in the last two rounds.
    seconds={'a': [1.0, 1.0, 1.0, 2.0, 2.0], 'b': [0.5, 0.7, 0.6, 0.8, 1.8]},
    bars={'b': 0.55},
  )
  ratio = comparison.ratio('b')
  assert (ratio.low, ratio.median, ratio.high) == pytest.approx((0.5, 0.6, 0.7))
  assert comparison.ratio('a') == results.Ratio(1.0, 1.0, 1.0)
  assert comparison.missed() == ['b']


@pytest.mark.parametrize(
  ('seconds', 'message'),
  [
    ({'b': [1.0]}, "reference 'a' of 'toy' was not measured"),
    ({'a': [1.0], 'b': [1.0, 2.0]}, 'same number of rounds'),
    ({'a': [], 'b': []}, 'at least 1'),
  ],
)
def test_comparisons_that_mean_nothing(results, seconds, message):
  with pytest.raises(ValueError, match=message):
    results.Comparison(title='toy', reference='a', seconds=seconds)


def test_table_and_json(results, tmp_path):
  comparison = results.Comparison(
    title='toy step',
    reference='peer',
    seconds={'peer': [0.2, 0.2, 0.2], 'ours': [0.1, 0.1, 0.1]},
    bars={'ours': 0.4},
    notes='A note.',
    info={'ours': {'version': '1'}},
  )
  lines = results.table([comparison]).splitlines()
  assert '| toy step | peer | 200 | 1 (reference) |  |  |' in lines
  assert (
    '| toy step | ours | 100 | 0.500 | 0.500–0.500 | ≤ 0.4 MISSED |' in lines
  )
  assert 'toy step: 3 interleaved rounds. A note.' in lines
  out = tmp_path / 'new' / 'out.json'
  results.write(out, [comparison])
  [entry] = json.loads(out.read_text())
  assert entry['ratios']['ours']['median'] == pytest.approx(0.5)
  assert entry['seconds']['peer'] == [0.2, 0.2, 0.2]
  assert entry['info'] == {'ours': {'version': '1'}}


def test_rates_stand_beside_ratios(results, tmp_path):
  rates = results.Rates(
    title='toy',
    unit='clips/s',
    values={'2 workers': [1.0, 3.0, 2.0]},
    notes='A.',
  )
  ratios = results.Comparison('step', 'a', {'a': [1.0]})
  text = results.table([rates, ratios])
  assert '| toy | 2 workers | 2 clips/s | 1.5–2.5 |' in text
  assert '| step | a | 1000 | 1 (reference) |  |  |' in text
  assert rates.missed() == []
  results.write(tmp_path / 'out.json', [rates, ratios])
  first, second = json.loads((tmp_path / 'out.json').read_text())
  assert first['values'] == {'2 workers': [1.0, 3.0, 2.0]}
  assert 'ratios' in second


def test_random_batches_have_the_shapes_of_the_recipe():
  mfu = importlib.import_module('benchmarks.mfu')
  exp = mfu.experiment('dit_xl2', 2)
  assert (exp.batch_size, exp.mesh.fsdp) == (32, 2)
  batch = mfu.random_batch(exp.batch_spec)
  assert batch['row'].tolist() == list(range(32))
  for name, spec in exp.batch_spec.items():
    if name != 'labels':
      assert (batch[name].shape, batch[name].dtype) == (spec.shape, spec.dtype)


def test_workers_are_timed(interleave):
  seconds, info = interleave.compare(
    [_toy(interleave, 'quick', 0.01), _toy(interleave, 'slow', 0.1)],
    rounds=3,
    repeats=2,
    settle=0.0,
  )
  assert {name: len(times) for name, times in seconds.items()} == {
    'quick': 3,
    'slow': 3,
  }
  assert min(seconds['slow']) >= 0.1
  assert min(seconds['quick']) >= 0.01
  assert min(seconds['quick']) < min(seconds['slow'])
  assert info['slow'] == {'work': 1, 'name': 'toy'}


def test_environment_of_a_worker(interleave, monkeypatch):
  monkeypatch.setenv('TOY_REMOVED', 'x')
  code = (
    'import os; from benchmarks import interleave; interleave.serve('
    'lambda: None, added=os.environ["TOY_ADDED"], '
    'removed=os.environ.get("TOY_REMOVED"))'
  )
  contestant = interleave.Contestant(
    'toy', ('-c', code), {'TOY_ADDED': 'y', 'TOY_REMOVED': None}
  )
  _, info = interleave.compare([contestant], rounds=1, settle=0.0)
  assert info['toy'] == {'added': 'y', 'removed': None}


def test_a_worker_that_does_not_start(interleave):
  broken = interleave.Contestant('broken', ('-c', 'import no_such_module'))
  with pytest.raises(
    interleave.WorkerError,
    match=r"(?s)'broken' ended with status 1.*No module named 'no_such_module'",
  ):
    interleave.compare([broken], rounds=1)


def test_a_worker_that_dies_at_work(interleave):
  code = (
    'import sys; from benchmarks import interleave; '
    'interleave.serve(lambda: sys.exit("out of luck"), warmup=0)'
  )
  dying = interleave.Contestant('dying', ('-c', code))
  with pytest.raises(
    interleave.WorkerError, match=r"(?s)'dying' ended.*out of luck"
  ):
    interleave.compare([dying], rounds=1, settle=0.0)


def test_workers_must_do_the_same_work(interleave):
  pair = [_toy(interleave, 'a', 0.0), _toy(interleave, 'b', 0.0, work=2)]
  with pytest.raises(
    interleave.WorkerError, match=r'(?s)different work.*a: 1.*b: 2'
  ):
    interleave.compare(pair, rounds=1)


def test_runs_all_named_benchmarks(tmp_path, monkeypatch, capsys, results):
  main = importlib.import_module('benchmarks.__main__')
  slow = results.Comparison(
    'toy', 'a', {'a': [1.0], 'b': [2.0]}, bars={'b': 1.5}
  )

  class Toy:
    @staticmethod
    def run(rounds):
      assert rounds == 1
      return slow

  monkeypatch.setitem(sys.modules, 'benchmarks.decoding', Toy)
  out = str(tmp_path / 'b')
  status = main.main(['decoding', '--rounds', '1', '--out', out])
  assert status == 1
  assert 'MISSED' in capsys.readouterr().out
  assert 'MISSED' in (tmp_path / 'b.md').read_text()
  assert json.loads((tmp_path / 'b.json').read_text())[0]['title'] == 'toy'


def test_unknown_benchmark(capsys):
  main = importlib.import_module('benchmarks.__main__')
  with pytest.raises(SystemExit):
    main.main(['decodign'])
  assert 'choose from masked_step' in capsys.readouterr().err


def test_the_driver_needs_no_torch(monkeypatch):
  for name in ('torch', 'transformers', 'diffusers'):
    monkeypatch.setitem(sys.modules, name, None)
  names = ('contestants', 'results', 'interleave')
  measured = ('input_pipeline', 'sampling', 'mfu')
  for name in (*names, *measured, 'masked_step', 'dit_step', 'dit_sampling'):
    sys.modules.pop(f'benchmarks.{name}', None)
    importlib.import_module(f'benchmarks.{name}')
