import numpy as np
import pytest

from vfm_jax.data import mocap


def test_bad_arguments():
  with pytest.raises(ValueError, match=r'data\.source\.actions'):
    mocap.MocapClips(actions=('swim',))
  with pytest.raises(ValueError, match=r'data\.source\.val_angles'):
    mocap.MocapClips(val_angles=(45.0,))


def test_renders_once_from_held_out_angles(tmp_path):
  pytest.importorskip('pybullet')
  options = {
    'actions': ('walk', 'kick'),
    'angles': (0.0,),
    'val_angles': (90.0,),
    'size': 32,
    'phases': 2,
    'cache_dir': str(tmp_path),
  }
  train = mocap.MocapClips(**options)
  val = mocap.MocapClips('val', **options)
  assert len(train) == len(val) == 4
  assert [train[i].labels['action'] for i in range(4)] == [0, 0, 1, 1]
  assert [s[0].labels['view'] for s in (train, val)] == [0, 1]
  assert train[0].id == 'walk/0/0'

  def frames(source, index):
    with source[index].open() as reader:
      return reader.read(np.arange(reader.num_frames))

  clip = frames(train, 0)
  assert clip.shape == (32, 32, 32, 3)
  assert clip.std() > 5
  assert (clip[0] != clip[10]).any()
  assert (clip != frames(val, 0)).any()
  # A motion that does not go round holds its last frame.
  assert len(frames(val, 3)) == 32
  files = list(tmp_path.iterdir())
  assert len(files) == 3
  assert all(f.suffix == '.npz' for f in files)
  # A second process reads what the first one rendered.
  before = {f: f.stat().st_mtime_ns for f in files}
  mocap._track.__wrapped__('walk', 0.0, 32, 30.0, str(tmp_path))
  assert {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()} == before
