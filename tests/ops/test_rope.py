import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.ops import rope

GRID = (2, 3, 4)


@pytest.mark.parametrize(
  ('at', 'want'),
  [
    (1, (-1.14263966, 2.00989983, -1.74497702, 4.0297995)),
    (3, (-1.27223251, 2.02909557, -3.53445752, 4.08818664)),
  ],
)
def test_tiled_layout_is_the_released_one(at, want):
  angle = rope.axis_angles(jnp.array([at]), 4, 'tiled')
  by = rope.Rotation(jnp.cos(angle), jnp.sin(angle))
  x = jnp.array([1.0, 2.0, 3.0, 4.0])[None, None, None]
  np.testing.assert_allclose(rope.rotate(x, by)[0, 0, 0], want, rtol=1e-6)


def logits(layout, shift):
  """Return the logits of all pairs of tokens, moved by `shift` in each axis."""
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 2, 20))
  at = rope.coordinates(GRID) + np.float32(shift)
  by = rope.rotation(jnp.asarray(at), 20, layout)
  q, k = (
    rope.rotate(jnp.broadcast_to(x, (1, len(at), 2, 20)), by) for x in (q, k)
  )
  return np.asarray(jnp.einsum('bnhd,bmhd->bhnm', q, k)), q


def test_paired_logits_depend_on_differences_alone_and_tiled_ones_do_not():
  np.testing.assert_allclose(
    logits('paired', 0)[0], logits('paired', 5)[0], atol=2e-5
  )
  assert np.abs(logits('tiled', 0)[0] - logits('tiled', 5)[0]).max() > 0.1


def test_each_axis_turns_its_part_and_the_rest_stays():
  """Heads of 20: 6 features an axis, 2 that nothing turns."""
  out = np.asarray(logits('paired', 0)[1][0, :, 0]).reshape(*GRID, 20)
  parts = [out[..., 6 * i : 6 * i + 6] for i in range(3)]
  for axis, part in enumerate(parts):
    first = np.take(part, [0], axis)
    assert np.abs(part - first).max() > 0.01
    for other in {0, 1, 2} - {axis}:
      np.testing.assert_array_equal(
        part, np.broadcast_to(np.take(part, [0], other), part.shape)
      )
  np.testing.assert_array_equal(
    out[..., 18:], np.broadcast_to(out[0, 0, 0, 18:], (*GRID, 2))
  )


def test_subsets_take_the_rows_of_the_whole():
  idx = jnp.array([[3, 0, 23], [7, 7, 1]])
  whole, some = (rope.of_tokens(GRID, i, 12) for i in (None, idx))
  np.testing.assert_array_equal(some.cos, whole.cos[idx])
  np.testing.assert_array_equal(some.sin, whole.sin[idx])


def test_heads_that_are_too_narrow():
  with pytest.raises(ValueError, match=r'at least 6 features.*found 5'):
    rope.of_tokens(GRID, None, 5)
