import pickle

import numpy as np
import PIL.Image
import pytest

from vfm_jax.data import video


@pytest.fixture
def frame_folder(tmp_path):
  for i in range(5):
    image = np.full((12, 17, 3), i * 20, np.uint8)
    PIL.Image.fromarray(image).save(tmp_path / f'{i:03d}.png')
  (tmp_path / 'notes.txt').write_text('not a frame')
  return tmp_path


def test_array_reader():
  frames = np.arange(4 * 2 * 3 * 3, dtype=np.uint8).reshape(4, 2, 3, 3)
  with video.ArrayReader(frames, 8.0) as reader:
    assert (reader.num_frames, reader.fps) == (4, 8.0)
    assert (reader.height, reader.width) == (2, 3)
    np.testing.assert_array_equal(reader.read([3, 0, 0]), frames[[3, 0, 0]])
    with pytest.raises(IndexError, match=r'4\.\.4 are outside the 4 frames'):
      reader.read([4])


def test_array_reader_rejects_what_is_no_video():
  with pytest.raises(video.DecodeError, match='zero frames'):
    video.ArrayReader(np.zeros((0, 2, 2, 3), np.uint8), 1)
  with pytest.raises(video.DecodeError, match=r'float32 \[2, 2, 2, 3\]'):
    video.ArrayReader(np.zeros((2, 2, 2, 3), np.float32), 1)


def test_frame_folder(frame_folder):
  with video.FrameFolderReader(frame_folder, 10) as reader:
    assert (reader.num_frames, reader.height, reader.width) == (5, 12, 17)
    got = reader.read(np.array([4, 1, 1]))
    np.testing.assert_array_equal(got[:, 0, 0, 0], [80, 20, 20])


def test_frame_folder_errors(frame_folder, tmp_path):
  with pytest.raises(video.DecodeError, match='missing'):
    video.FrameFolderReader(tmp_path / 'none', 1)
  empty = tmp_path / 'empty'
  empty.mkdir()
  with pytest.raises(video.DecodeError, match='zero frames'):
    video.FrameFolderReader(empty, 1)
  PIL.Image.new('RGB', (5, 5)).save(frame_folder / '003.png')
  (frame_folder / '004.png').write_bytes(b'no image')
  with video.FrameFolderReader(frame_folder, 1) as reader:
    with pytest.raises(video.DecodeError, match=r'003\.png is \(5, 5\)'):
      reader.read([0, 3])
    with pytest.raises(video.DecodeError, match=r'004\.png is not a readable'):
      reader.read([4])


def test_errors_survive_pickling():
  error = pickle.loads(pickle.dumps(video.DecodeError('a.mp4', 'empty')))
  assert (error.name, error.reason) == ('a.mp4', 'empty')
  assert str(error) == 'a.mp4: empty'
