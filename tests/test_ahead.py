"""Check what compiled steps are read for, on fake devices and for a TPU."""

import functools
import importlib.util
import json
import re

import jax
import pytest
from absl.testing import flagsaver

from vfm_jax import (
  ahead,
  ahead_text,
  config,
  describe,
  levers,
  main,
  optim,
  schedules,
  sharding,
  topology,
  verbs,
)
from vfm_jax.data import augment, clips, synthetic
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.experiment import Data, Experiment
from vfm_jax.models.dit import DiT
from vfm_jax.models.encoders import VideoViT
from vfm_jax.models.predictors import PixelDecoder
from vfm_jax.models.switch import switch
from vfm_jax.objectives.denoise import Denoise
from vfm_jax.objectives.masked import Masked

SIZE, FRAMES, BATCH = 16, 4, 16
SMALL = dict(width=32, heads=2, depth=3, scan=True)
DEVICES = 8
FAKE = topology.Target(
  'fake:8', 'cpu', 'CPU', DEVICES, 2**30, 1e12, None, 'nobody'
)


def experiment(name, *, devices=DEVICES, **kw):
  video = dict(patch=8, frames=FRAMES)
  objective = {
    'masked': lambda: Masked(
      VideoViT(size='S', image_size=SIZE, **video, **SMALL),
      PixelDecoder(**{**SMALL, 'depth': 2}),
    ),
    'dit': lambda: Denoise(_dit(), data='video', label=None),
    'switch': lambda: Denoise(_dit(hooks=switch()), data='video', label=None),
  }[name]()
  source = synthetic.MovingShapes(count=16, frames=FRAMES, size=SIZE)
  sample = functools.partial(clips.uniform, frames=FRAMES)
  train = Pipeline(source, sample, augment.identity)
  lr = functools.partial(schedules.constant, value=1e-3)
  return Experiment(
    objective=objective,
    data=Data(train=train),
    optim=optim.Optimizer(lr),
    batch_size=BATCH * devices // DEVICES,
    steps=2,
    **{'mesh': sharding.Mesh(data=1, fsdp=devices), **kw},
  )


def _dit(**kw):
  return DiT(
    size='S',
    patch=8,
    tubelet=2,
    frames=FRAMES,
    input_size=SIZE,
    channels=3,
    num_classes=0,
    label_dropout=0.0,
    **SMALL,
    **kw,
  )


@pytest.fixture
def fake(monkeypatch):
  """Let the eight devices of the tests be the target."""
  monkeypatch.setattr(topology, 'devices', lambda target: jax.devices())


# How often a step runs each kind, of which each layer of a stack has its share:
# a change here is a change of what a pod sends.
COUNTS = {
  'masked': {'all-gather': 65, 'all-reduce': 9},
  'dit': {'all-gather': 50, 'all-reduce': 9},
  'switch': {'all-gather': 66, 'all-reduce': 9},
}

# Of each example of the batch how much each of three experts counts.
GATHERED = {'switch': [[f'f32[{BATCH}, 3]']]}


@pytest.mark.parametrize(
  'name',
  [
    'masked',
    pytest.param('dit', marks=pytest.mark.slow),
    pytest.param('switch', marks=pytest.mark.slow),
  ],
)
def test_collectives_of_a_step(name, fake):
  found = ahead.analyse(experiment(name), FAKE)
  runs = {k: c['runs'] for k, c in found['collectives'].items()}
  assert runs == COUNTS[name]
  # Cut parameters are gathered for the tokens, never tokens.
  others = [g['shape'] for g in found['other_gathers']]
  assert others == GATHERED.get(name, [])
  assert found['fits']
  json.dumps(found)
  text = ahead_text.text(found)
  for part in ('params', 'in a step', 'peak', 'all-gather', 'model FLOPs'):
    assert part in text
  assert 'ESTIMATE' not in text  # its compiler estimates nothing


def test_layout_levers_are_exact():
  exp = experiment('masked', devices=64, mesh=sharding.Mesh(fsdp=8))
  state = exp.abstract_state
  layout = levers.layout_bytes(exp, 64)
  assert 'gradients' not in layout
  saved = levers.exact(exp, 64)
  half, wider = saved['bfloat16 first moments'], saved['fsdp=16']
  assert half == layout['params'] // 2
  whole = levers.layout_bytes(
    experiment('masked', devices=64, mesh=sharding.Mesh()), 64
  )
  then = levers.layout_bytes(
    experiment('masked', devices=64, mesh=sharding.Mesh(fsdp=16)), 64
  )
  assert wider == sum(layout.values()) - sum(then.values()) > 0
  count = sum(x.size for x in jax.tree.leaves(state.params))
  assert whole['params'] == 4 * count
  # 32 features do not divide by 64.
  assert 'fsdp=64' not in saved


def test_remat_of_all_modules():
  objective = experiment('masked').objective
  assert levers.remat_policies(objective) == {'none'}
  full = levers.with_remat(objective, 'full')
  assert full.encoder.remat == full.decoder.remat == 'full'
  assert levers.with_remat(full, 'none') == objective
  names = levers.compiled(experiment('masked'), DEVICES)
  assert set(names) == {'remat=dots', 'remat=full', 'accum=2'}
  assert names['accum=2'].accum == 2
  inner = experiment('switch').objective
  assert levers.remat_policies(levers.with_remat(inner, 'dots')) == {'dots'}


def test_model_flops_leave_out_what_remat_repeats():
  exp = experiment('dit')
  plain = ahead.model_flops(exp)
  full = Experiment(
    **{
      **{f: getattr(exp, f) for f in exp.__dataclass_fields__},
      'objective': levers.with_remat(exp.objective, 'full'),
    }
  )
  assert ahead.model_flops(full) == plain > 0


@pytest.mark.parametrize(
  ('text', 'need', 'have'),
  [
    (
      'XLA:TPU compile permanent error. Ran out of memory in memory space hbm. '
      'Used 45.60G of 15.75G hbm. Exceeded hbm capacity by 29.85G.',
      45.6,
      15.75,
    ),
    (
      'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required '
      'for HLO temporaries (16.95G) exceeds available HBM (15.75G).',
      16.95,
      15.75,
    ),
  ],
)
def test_refusals_for_memory(text, need, have):
  found = ahead.overflow(RuntimeError(text))
  assert found == (int(need * 2**30), int(have * 2**30))


def test_other_errors_of_the_compiler_are_not_swallowed():
  with pytest.raises(RuntimeError, match='vmem'):
    ahead.overflow(RuntimeError('Used 17M of 16M vmem'))


def test_what_does_not_fit_is_said_and_ends_with_1(
  monkeypatch, tmp_path, fake, capsys, parsed_flags
):
  exp, out = experiment('dit'), tmp_path / 'found.json'
  small = ahead.Compiled(1.0, need=20 * 2**30, have=16 * 2**30)
  monkeypatch.setattr(ahead, 'compile_step', lambda *_: small)
  monkeypatch.setattr(topology, 'parse', lambda name: FAKE)
  monkeypatch.setattr(topology, 'stay_on_cpu', lambda: None)
  with (
    flagsaver.flagsaver(topology='fake:8', out=str(out)),
    pytest.raises(SystemExit, match='1'),
  ):
    main._describe(exp, '', config.ConfigDict())
  assert 'does not fit: needs 20 GiB of 16 GiB' in capsys.readouterr().out
  assert json.loads(out.read_text())['fits'] is False


def test_a_batch_that_does_not_divide_is_refused_before_compiling():
  exp = experiment('dit', mesh=sharding.Mesh(fsdp=32))
  with pytest.raises(sharding.ShardingError, match='a multiple of 256'):
    ahead.compile_step(exp, topology.parse('v5e:16x16'))


@pytest.mark.ahead
@pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None, reason='needs the extra `tpu`'
)
@pytest.mark.parametrize('name', ['masked', 'switch'])
def test_a_step_for_a_tpu(name):
  exp = experiment(name, devices=4)
  found = verbs.describe_ahead(exp, 'v5e:2x2')
  data = found.data
  assert data['fits']
  largest = max((g['bytes'] for g in data['other_gathers']), default=0)
  assert largest < 4096
  assert data['collectives']['all-gather']['runs'] > 0
  assert 0 < data['mfu'] < 1
  assert set(data['kernels']) == {'flash_tpu_forward', 'flash_tpu_backward'}
  assert re.search(r'ESTIMATE.*1\.5 GHz', found.text)
  assert isinstance(found, describe.Description)
