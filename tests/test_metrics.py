"""Check what accumulates metrics and what writes them."""

import io
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from vfm_jax import metrics, plots


def test_buffer_hands_over_the_previous_interval():
  buffer = metrics.MetricBuffer()
  assert buffer.flush() is None
  for step in (1, 2, 3):
    buffer.append(step, {'loss': jnp.float32(step)})
  assert buffer.flush() is None
  buffer.append(4, {'loss': jnp.float32(10), 'aux': jnp.int32(3)})
  buffer.append(5, {'loss': jnp.float32(20)})
  assert buffer.flush() == (3, {'loss': 2.0})
  assert buffer.drain() == (5, {'aux': 3.0, 'loss': 15.0})
  assert buffer.drain() is None


def test_buffer_keeps_what_is_not_finite():
  buffer = metrics.MetricBuffer()
  buffer.append(1, {'loss': jnp.float32(np.nan)})
  buffer.append(2, {'loss': jnp.float32(1)})
  buffer.flush()
  assert np.isnan(buffer.drain()[1]['loss'])


def test_buffer_makes_no_transfer_before_it_is_asked():
  buffer = metrics.MetricBuffer()
  step = jax.jit(lambda x: {'loss': x * 2})
  x = jax.device_put(np.float32(1))
  with jax.transfer_guard('disallow'):
    buffer.append(1, step(x))
    buffer.append(2, step(x))
  assert buffer.flush() is None


def test_drain_refuses_an_open_interval():
  buffer = metrics.MetricBuffer()
  buffer.append(1, {'loss': jnp.float32(1)})
  with pytest.raises(RuntimeError, match='flush'):
    buffer.drain()


class Clock:
  def __init__(self):
    self.now = 0.0

  def __call__(self):
    return self.now


def test_throughput_leaves_compilation_and_pauses_out():
  clock = Clock()
  meter = metrics.ThroughputMeter(8, clock=clock)
  with meter.waiting():
    clock.now += 50
  clock.now += 100  # compilation
  meter.step()
  assert meter.flush() == {}
  for _ in range(4):
    with meter.waiting():
      clock.now += 0.5
    clock.now += 1.5
    meter.step()
  with meter.paused():
    clock.now += 1000
  got = meter.flush()
  assert got == {'examples_per_s': 4.0, 'step_s': 2.0, 'data_wait': 0.25}
  assert meter.flush() == {}
  clock.now += 4
  meter.step()
  assert meter.flush()['step_s'] == 4.0


def test_device_memory_is_absent_on_cpus_and_in_gib_elsewhere(monkeypatch):
  device = types.SimpleNamespace(memory_stats=lambda: None)
  monkeypatch.setattr(jax, 'local_devices', lambda: [device])
  assert metrics.device_memory() == {}
  device.memory_stats = lambda: {'peak_bytes_in_use': 3 * 2**30}
  assert metrics.device_memory() == {'device_gib': 3.0}


def test_progress_line():
  out, clock = io.StringIO(), Clock()
  writer = metrics.ProgressWriter(1000, start_step=100, stream=out, clock=clock)
  clock.now = 20.0
  writer.scalars(200, {'loss': 0.51234, 'lr': 1.5e-4})
  writer.scalars(
    500,
    {
      'loss': 0.25,
      'lr': 1e-4,
      'step_s': 8.0,
      'examples_per_s': 512.3,
      'data_wait': 0.031,
      'device_gib': 12.44,
      'grad_norm': 1.0,
    },
  )
  writer.scalars(500, {'probes/scene_knn20_top1': 0.71})
  assert out.getvalue().splitlines() == [
    'step 200/1000  20.0% | eta 0:02:40 | loss 0.5123 | lr 1.50e-04',
    'step 500/1000  50.0% | eta 1:06:40 | 512.3 examples/s | data wait 3% | '
    '12.4 GiB | loss 0.2500 | lr 1.00e-04',
    'step 500/1000  50.0% | probes/scene_knn20_top1 0.71',
  ]


def test_jsonl_drops_what_lies_past_the_restored_step(tmp_path):
  path = tmp_path / 'deep' / 'metrics.jsonl'
  writer = metrics.JsonlWriter(path)
  for step in (10, 20, 30):
    writer.scalars(step, {'loss': np.float32(step)})
  writer.text(20, {'note': 'hello'})
  writer.close()
  with path.open('a') as f:
    f.write('{"step": 15, "lo')  # killed in the middle of a line
  writer = metrics.JsonlWriter(path, start_step=20)
  writer.scalars(30, {'loss': 1.0, 'bad': float('nan')})
  rows = [json.loads(s) for s in path.read_text().splitlines()]
  writer.close()
  assert [r['step'] for r in rows] == [10, 20, 20, 30]
  assert rows[2]['text'] == {'note': 'hello'}
  assert (rows[3]['loss'], rows[3]['bad']) == (1.0, None)
  steps, losses = plots.read_jsonl(path)['loss']
  np.testing.assert_array_equal(steps, [10, 20, 30])
  np.testing.assert_array_equal(losses, [10, 20, 1])
  assert not list(path.parent.glob('*.tmp'))


def events(folder):
  """Read the records of the only event file in a folder."""
  out = []
  for path in sorted(folder.glob('events*')):
    data, at = path.read_bytes(), 0
    while at < len(data):
      n = int.from_bytes(data[at : at + 8], 'little')
      out.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + n]))
      at += 16 + n
  return out


VIDEOS = {
  kind: np.random.default_rng(0).integers(
    0, 255, (2, 3, 8, 8, 3), dtype=np.uint8
  )
  for kind in ('original', 'masked')
}


def test_tensorboard(tmp_path):
  writer = metrics.TensorBoardWriter(tmp_path, start_step=7)
  writer.scalars(8, {'loss': 0.5})
  writer.videos(8, VIDEOS)
  writer.text(8, {'note': 'hello'})
  writer.close()
  found = events(tmp_path)
  assert [e.step for e in found if e.session_log.status] == [8]
  values = {v.tag: v for e in found for v in e.summary.value}
  assert values['loss'].simple_value == 0.5
  assert 'note/text_summary' in values or 'note' in values
  picture = Image.open(io.BytesIO(values['clips'].image.encoded_image_string))
  assert (picture.format, picture.n_frames) == ('GIF', 3)
  assert picture.size == (
    values['clips'].image.width,
    values['clips'].image.height,
  )


def test_wandb(tmp_path, monkeypatch):
  logged, runs = [], []
  run = types.SimpleNamespace(
    log=logged.append,
    define_metric=lambda *a, **k: None,
    finish=lambda: logged.append('finished'),
  )
  fake = types.ModuleType('wandb')
  fake.init = lambda **kwargs: runs.append(kwargs) or run
  fake.Video = lambda path, format: (path.rsplit('/')[-1], format)
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  for _ in range(2):
    writer = metrics.make_writer(
      str(tmp_path), total_steps=9, tensorboard=False, wandb='proj',
      config={'a': 1},
    ).writers[-1]  # fmt: skip
  writer.scalars(3, {'loss': np.float32(0.5)})
  writer.videos(3, VIDEOS)
  writer.close()
  assert runs[0] == runs[1]
  assert (runs[0]['project'], runs[0]['config']) == ('proj', {'a': 1})
  assert logged == [
    {'step': 3, 'loss': 0.5},
    {'step': 3, 'clips': ('clips.gif', 'gif')},
    'finished',
  ]


def test_wandb_names_its_extra(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(ImportError, match=r'vfm_jax\[wandb\]'):
    metrics.make_writer(str(tmp_path), total_steps=1, wandb='proj')


def test_make_writer_writes_everywhere(tmp_path, capsys):
  writer = metrics.make_writer(str(tmp_path), total_steps=4)
  writer.scalars(2, {'loss': 1.0})
  writer.videos(2, VIDEOS)
  writer.text(2, {'note': 'hello'})
  writer.close()
  assert 'step 2/4  50.0%' in capsys.readouterr().out
  assert len((tmp_path / 'metrics.jsonl').read_text().splitlines()) == 2
  assert events(tmp_path / 'events')
  names = sorted(p.name for p in (tmp_path / 'media').iterdir())
  assert names == ['00000002.gif', '00000002.png']


def test_only_process_0_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  writer = metrics.make_writer(str(tmp_path), total_steps=4)
  writer.scalars(2, {'loss': 1.0})
  writer.close()
  assert not list(tmp_path.iterdir())
