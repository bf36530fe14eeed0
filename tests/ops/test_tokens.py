import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.ops import tokens


def test_patchify_puts_a_pixel_at_its_index():
  p, t, y, x, c = 4, 3, 6, 9, 1
  video = np.zeros((1, 4, 8, 12, 3), np.float32)
  video[0, t, y, x, c] = 1
  out = np.asarray(tokens.patchify(video, (2, p, p)))
  token = (t // 2) * 2 * 3 + (y // p) * 3 + x // p
  feature = (((t % 2) * p + y % p) * p + x % p) * 3 + c
  assert np.argwhere(out[0]).tolist() == [[token, feature]]


def test_unpatchify_undoes_patchify():
  rng = np.random.default_rng(0)
  video = rng.normal(size=(2, 4, 8, 12, 3)).astype(np.float32)
  cut = tokens.patchify(video, (2, 4, 3))
  np.testing.assert_array_equal(
    tokens.unpatchify(cut, (2, 2, 4), (2, 4, 3)), video
  )
  with pytest.raises(ValueError, match='expected 8 tokens'):
    tokens.unpatchify(cut, (2, 2, 2), (2, 4, 3))


def test_split_by_mask_is_ascending_and_merge_undoes_it():
  mask = np.array([[1, 0, 1, 0, 0], [0, 0, 1, 1, 0]], bool)
  visible, hidden = tokens.split_by_mask(mask, 2)
  assert visible.tolist() == [[1, 3, 4], [0, 1, 4]]
  assert hidden.tolist() == [[0, 2], [2, 3]]
  x = jnp.arange(20.0).reshape(2, 5, 2)
  parts = tokens.take(x, visible), tokens.take(x, hidden)
  back = tokens.merge(parts[0], visible, parts[1], hidden)
  np.testing.assert_array_equal(back, x)
  np.testing.assert_array_equal(tokens.take(x[0], visible)[1], x[0, [0, 1, 4]])


@pytest.mark.parametrize(
  ('shape', 'message'),
  [
    ((1, 3, 8, 8, 3), r'multiple of 2, found 3 .*`encoder.tubelet`'),
    ((1, 2, 9, 8, 3), r'rows.*multiple of 4, found 9 .*`encoder.patch`'),
    ((1, 2, 8, 6, 3), r'columns.*multiple of 4, found 6 .*`encoder.patch`'),
    ((2, 8, 8, 3), r'expected a video \[B, T, H, W, C\], found'),
  ],
)
def test_a_video_that_does_not_divide_is_refused(shape, message):
  with pytest.raises(ValueError, match=message):
    tokens.patchify(jnp.zeros(shape), (2, 4, 4))


def test_an_image_fills_one_tubelet():
  image = jnp.ones((1, 1, 4, 4, 3))
  assert tokens.fill_tubelet(image, 2).shape == (1, 2, 4, 4, 3)
  assert tokens.fill_tubelet(jnp.ones((1, 3, 4, 4, 3)), 2).shape[1] == 3
