import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.ops import segments
from vfm_jax.ops.focal import sigmoid_focal

RANGES = ((0, 4), (4, 8), (8, 10_000))


compiled = jax.jit(segments.assign, static_argnames=('num_classes', 'radius'))


def assign(spans, labels=(), radius: float | None = 1.5):
  points = segments.points(64, RANGES)
  # Room for three, so that one program serves all.
  room, names = np.zeros((3, 2), np.float32), np.zeros(3, int)
  room[: len(spans)] = np.reshape(spans, (-1, 2))
  names[: len(labels)] = labels
  classes, offsets = compiled(
    points, room, names, np.arange(3) < len(spans), num_classes=2, radius=radius
  )
  return points, np.asarray(classes), np.asarray(offsets)


def test_every_segment_is_found_and_read_back_from_its_points():
  rng = np.random.default_rng(0)
  for length in (2.0, 5.0, 7.5, 12.0, 30.0):
    start = rng.uniform(2, 30)
    points, classes, offsets = assign([[start, start + length]])
    hit = classes[:, 0] > 0
    assert hit.any()
    at, stride = points.at[hit], points.stride[hit]
    ends = offsets[hit] * stride[:, None]
    np.testing.assert_allclose(at - ends[:, 0], start, atol=1e-4)
    np.testing.assert_allclose(at + ends[:, 1], start + length, atol=1e-4)


def test_the_shortest_wins_and_equal_ones_share_their_classes():
  _, classes, offsets = assign([[8, 16], [10, 13], [10, 13]], [0, 0, 1])
  assert classes[11].tolist() == [1, 1]
  assert offsets[11].tolist() == [1, 2]


def test_ranges_are_closed_and_the_inside_is_open():
  # The farther end of the only point inside is exactly 4 steps away.
  points, classes, _ = assign([[4, 12]])
  hit = [
    (float(points.stride[i]), float(points.at[i]))
    for i in np.flatnonzero(classes[:, 0])
  ]
  assert hit == [(1.0, 8.0), (2.0, 6.0), (2.0, 8.0), (2.0, 10.0)]
  _, classes, _ = assign([[4, 6]], radius=None)
  assert np.flatnonzero(classes[:64, 0]).tolist() == [5]


def test_no_segment_gives_no_positive():
  _, classes, offsets = assign([])
  assert not classes.any()
  assert np.isfinite(offsets).all()


def test_length_must_fit_the_levels():
  with pytest.raises(ValueError, match='3 levels need a length that 4 divides'):
    segments.points(10, RANGES)


def test_distance_iou():
  a = jnp.array([[1.0, 2], [0, 0], [2, 2]])
  b = jnp.array([[2.0, 1], [1, 1], [2, 2]])
  loss = jax.jit(segments.diou_loss)
  np.testing.assert_allclose(loss(a, b), [0.5625, 1, 0], atol=1e-6)
  np.testing.assert_allclose(loss(a, b), loss(b, a), atol=1e-6)
  empty = jnp.zeros(2)
  grad = jax.jit(jax.grad(segments.diou_loss))(empty, empty)
  assert not np.asarray(grad).any()


def test_focal_loss():
  x, y = jnp.array([0.5, -1, 2]), jnp.array([1, 0, 0.9])
  np.testing.assert_allclose(
    sigmoid_focal(x, y), [0.0169, 0.0170, 0.0037], atol=5e-5
  )
  p = jax.nn.sigmoid(x)
  np.testing.assert_allclose(
    sigmoid_focal(x, jnp.ones(3)), -0.25 * (1 - p) ** 2 * jnp.log(p), rtol=1e-5
  )
