import pickle

import numpy as np
import pytest

from vfm_jax.data import synthetic


def frames(source, index):
  with source[index].open() as reader:
    return reader.read(np.arange(reader.num_frames))


def test_examples_are_functions_of_seed_and_index():
  source = synthetic.MovingShapes(count=100)
  again = pickle.loads(pickle.dumps(source))
  np.testing.assert_array_equal(frames(source, 7), frames(again, 7))
  assert frames(source, 7).shape == (16, 64, 64, 3)
  other = synthetic.MovingShapes(count=100, seed=1)
  assert (frames(source, 7) != frames(other, 7)).any()
  assert len({source[i].id for i in range(100)}) == 100


def test_labels_are_balanced():
  source = synthetic.MovingShapes(count=64)
  pairs = [tuple(source[i].labels.values()) for i in range(64)]
  assert all(pairs.count((s, d)) == 2 for s in range(4) for d in range(8))


@pytest.mark.parametrize('directions', [4, 8])
def test_the_shape_moves_as_its_label_says(directions):
  source = synthetic.MovingShapes(
    count=64, directions=directions, noise=0.0, speed=(2.0, 2.0)
  )
  for index in range(1, 4 * directions, 4):  # circles
    seen = frames(source, index)[:4]
    mask = (seen != np.array([96, 96, 96])).any(-1)
    # The phase of the first Fourier mode is the position on the torus.
    phase = np.exp(2j * np.pi * np.arange(64) / 64)
    x = np.angle((mask.sum(1) * phase).sum(1)) * 64 / (2 * np.pi)
    y = np.angle((mask.sum(2) * phase).sum(1)) * 64 / (2 * np.pi)
    dx = np.mean((np.diff(x) + 32) % 64 - 32)
    dy = np.mean((np.diff(y) + 32) % 64 - 32)
    angle = 2 * np.pi * source[index].labels['direction'] / directions
    np.testing.assert_allclose(
      [dx, dy], [2 * np.cos(angle), 2 * np.sin(angle)], atol=0.4
    )


def test_bad_arguments():
  with pytest.raises(ValueError, match=r'data\.source\.directions'):
    synthetic.MovingShapes(directions=5)
  with pytest.raises(IndexError):
    synthetic.MovingShapes(count=3)[3]
