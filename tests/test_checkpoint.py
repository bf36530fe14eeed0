"""Check saving, restoring anywhere, retention, crashes and warm starts."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vfm_jax import checkpoint, sharding, trees
from vfm_jax.checkpoint import Checkpointer, CheckpointError
from vfm_jax.sharding import Mesh


def make_state(width=4, seed=0):
  kernel = jax.random.normal(jax.random.key(seed), (16, width))
  params = {
    'encoder': {'fc1': {'kernel': kernel, 'bias': jnp.arange(width * 1.0)}},
    'head': {'kernel': 2 * kernel},
  }
  return {
    'step': jnp.int32(seed),
    'params': params,
    'opt_state': optax.adam(1e-3, mu_dtype='bfloat16').init(params),
    'ema': {'0.999': jax.tree.map(lambda p: -p, params)},
    'extra': {},
    'rng': jax.random.key_data(jax.random.key(seed)),
  }


def abstract(**kw):
  return jax.eval_shape(lambda: make_state(**kw))


def assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def folder(tmp_path):
  return str(tmp_path / 'checkpoints')


def test_a_state_comes_back_bit_for_bit(folder):
  state = make_state(seed=3)
  with Checkpointer(folder, info={'fingerprint': 'abc'}) as saved:
    assert saved.latest_step() is None
    assert saved.save(3, state, force=True)
  with Checkpointer(folder) as saved:
    assert saved.latest_step() == 3
    got = saved.restore(abstract())
    info = saved.read_info()
  assert_equal(got, state)
  assert info['fingerprint'] == 'abc'
  assert info['packages']['jax'] == jax.__version__
  assert info['leaves']['params/head/kernel'] == [[16, 4], 'float32']


def test_meshes_of_eight_four_and_one(folder):
  devices = jax.devices()
  state = make_state()
  mesh8 = sharding.make_mesh(Mesh(data=1, fsdp=-1), devices)
  placed = jax.device_put(state, sharding.infer(state, mesh8))
  with Checkpointer(folder) as saved:
    saved.save(1, placed, force=True)
    saved.wait()
    for n, fsdp in ((4, 2), (1, 1)):
      mesh = sharding.make_mesh(Mesh(fsdp=fsdp), devices[:n])
      shardings = sharding.infer(abstract(), mesh)
      got = saved.restore(abstract(), shardings)
      assert_equal(got, state)
      kernel = got['params']['head']['kernel']
      assert kernel.sharding == shardings['params']['head']['kernel']
      assert len(kernel.sharding.device_set) == n


def test_when_a_save_is_due(folder, monkeypatch):
  now = [0.0]
  monkeypatch.setattr(checkpoint.time, 'monotonic', lambda: now[0])
  with Checkpointer(
    folder, every_steps=10, every_minutes=1, keep_every_steps=25
  ) as saved:
    assert [s for s in range(1, 31) if saved.should_save(s)] == [10, 20, 25, 30]
    now[0] = 61.0
    assert saved.should_save(31)
    assert saved.save(31, make_state())
    assert not saved.should_save(32)
    assert not saved.save(32, make_state())
    assert not saved.save(31, make_state(), force=True)  # is there already


def test_retention(folder):
  with Checkpointer(folder, keep_last=2, keep_every_steps=4) as saved:
    for step in range(1, 8):
      saved.save(step, make_state(), force=True)
    saved.wait()
    assert saved.all_steps() == [4, 6, 7]
    assert int(saved.restore(abstract(), step=4)['step']) == 0
    with pytest.raises(CheckpointError, match=r'of step 5 .* \[4, 6, 7\]'):
      saved.restore(abstract(), step=5)


def test_a_donated_buffer_does_not_spoil_a_save_under_way(folder):
  state = make_state()
  step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  expected = jax.tree.map(np.asarray, state)
  with Checkpointer(folder) as saved:
    saved.save(1, state, force=True)
    for _ in range(3):
      state = step(state)
    saved.wait()
    assert_equal(saved.restore(abstract()), expected)


def test_an_empty_directory_has_nothing_to_restore(folder):
  with (
    Checkpointer(folder) as saved,
    pytest.raises(CheckpointError, match=r'no checkpoint in .*found steps'),
  ):
    saved.restore(abstract())


def test_the_checkpoint_of_another_model_is_explained(folder):
  with Checkpointer(folder) as saved:
    saved.save(1, make_state(), force=True)
    saved.wait()
    other = abstract(width=8)
    other['params']['new'] = jax.ShapeDtypeStruct((2,), jnp.float32)
    del other['ema']['0.999']['head']
    with pytest.raises(CheckpointError) as e:
      saved.restore(other)
  text = str(e.value)
  assert 'of another model' in text
  assert '1 missing in the checkpoint:\n  params/new' in text
  assert '1 only in the checkpoint:\n  ema/0.999/head/kernel' in text
  assert 'params/head/kernel: float32[16, 4], float32[16, 8]' in text


def test_typed_keys_are_refused(folder):
  with (
    Checkpointer(folder) as saved,
    pytest.raises(CheckpointError, match=r"\['rng'\].*key_data"),
  ):
    saved.save(1, {'rng': jax.random.key(0)}, force=True)


def test_a_directory_that_cannot_be_made(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(CheckpointError, match=r'cannot open .*GiB free'):
    Checkpointer(str(tmp_path / 'file' / 'checkpoints'))


def run_worker(code, folder):
  header = """
    import os, resource, signal, sys
    import jax, jax.numpy as jnp
    from vfm_jax.checkpoint import Checkpointer, CheckpointError
    def state(step):
      return {'step': jnp.int32(step), 'w': jnp.full((1 << 20,), step * 1.0)}
  """
  code = textwrap.dedent(header) + textwrap.dedent(code)
  return subprocess.run(
    [sys.executable, '-c', code, folder],
    cwd=pathlib.Path(__file__).parents[1],
    env={**os.environ, 'JAX_NUM_CPU_DEVICES': '1'},
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )


def big(step):
  return {'step': jnp.int32(step), 'w': jnp.full((1 << 20,), step * 1.0)}


def test_kill_9_in_a_save_leaves_the_last_good_one(folder):
  done = run_worker(
    """
    def die(event, args):
      if event == 'os.rename' and str(args[1]).rstrip('/').endswith('/2'):
        os.kill(os.getpid(), signal.SIGKILL)
    with Checkpointer(sys.argv[1]) as saved:
      saved.save(1, state(1), force=True)
      saved.wait()
      sys.addaudithook(die)  # at the rename that would finish step 2
      saved.save(2, state(2), force=True)
    print('survived')
    """,
    folder,
  )
  assert done.returncode == -9, done.stderr
  left = sorted(os.listdir(folder))
  assert len(left) == 2  # step 1 and the unfinished step 2
  with Checkpointer(folder, read_only=True) as saved:
    assert saved.all_steps() == [1]
  assert sorted(os.listdir(folder)) == left
  with Checkpointer(folder) as saved:
    assert float(saved.restore(jax.eval_shape(lambda: big(0)))['w'][0]) == 1
    saved.save(2, big(2), force=True)
    saved.wait()
    assert saved.all_steps() == [1, 2]
  assert sorted(os.listdir(folder)) == ['1', '2']  # no debris


def test_a_full_disk_is_one_error_and_leaves_the_last_good_one(folder):
  done = run_worker(
    """
    with Checkpointer(sys.argv[1]) as saved:
      saved.save(1, state(1), force=True)
      saved.wait()
      # Files may not grow past 10 kB from now on, as on a full disk.
      resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
      try:
        noise = jax.random.normal(jax.random.key(0), (1 << 20,))
        saved.save(2, {**state(2), 'w': noise}, force=True)
        saved.wait()
      except CheckpointError as e:
        print('CAUGHT', e)
      print('LATEST', saved.latest_step())
    """,
    folder,
  )
  assert 'CAUGHT cannot save checkpoints in' in done.stdout, done.stderr
  assert 'Finished checkpoints there: [1]' in done.stdout
  assert 'LATEST 1' in done.stdout
  with Checkpointer(folder) as saved:
    assert saved.all_steps() == [1]
    assert float(saved.restore(jax.eval_shape(lambda: big(0)))['w'][0]) == 1


@pytest.fixture
def source(folder):
  with Checkpointer(folder) as saved:
    saved.save(5, make_state(seed=5), force=True)
  return folder


def target(width=4):
  return {
    'backbone': {
      'fc1': {'kernel': jnp.zeros((16, width)), 'bias': jnp.zeros(width)}
    },
    'classifier': {'kernel': jnp.ones((16, 2))},
  }


MAPPING = (('encoder/(.*)', r'backbone/\1'),)


@pytest.mark.parametrize(('item', 'sign'), [('params', 1), ('ema/0.999', -1)])
def test_warm_start(source, item, sign):
  mesh = sharding.make_mesh(Mesh(data=1, fsdp=-1))
  init = target()
  params = jax.device_put(init, sharding.infer(init, mesh))
  got = checkpoint.warm_start(
    params,
    source,
    item=item,
    mapping=MAPPING,
    fresh=('classifier/.*',),
    ignore=('head/.*',),
  )
  old = make_state(seed=5)['params']['encoder']
  assert_equal(got['backbone'], jax.tree.map(lambda x: sign * x, old))
  assert_equal(got['classifier'], init['classifier'])
  for (_, a), (_, b) in zip(
    trees.path_leaves(got), trees.path_leaves(params), strict=True
  ):
    assert a.sharding == b.sharding


def test_warm_start_lists_every_offence(source):
  with pytest.raises(CheckpointError) as e:
    checkpoint.warm_start(
      target(width=8), source, mapping=MAPPING, fresh=('nothing',)
    )
  text = str(e.value)
  assert 'encoder/fc1/kernel -> backbone/fc1/kernel: [16, 4] there' in text
  assert 'head/kernel -> head/kernel: no such parameter' in text
  assert 'classifier/kernel: not in the source' in text
  assert "pattern 'nothing' matches nothing" in text


def test_warm_start_from_nowhere(tmp_path, source):
  with pytest.raises(CheckpointError, match='there is no directory'):
    checkpoint.warm_start(target(), str(tmp_path / 'absent'))
  with pytest.raises(CheckpointError, match=r"item='ema/0.5'.*'params'"):
    checkpoint.warm_start(target(), source, item='ema/0.5')


def test_info_is_json(source):
  with Checkpointer(source, read_only=True) as saved:
    json.dumps(saved.read_info(5))
