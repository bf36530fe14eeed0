import numpy as np
import pytest

from vfm_jax.ops import positions


@pytest.mark.parametrize(
  ('dim', 'total', 'entries'),
  [
    (
      768,
      244_000 + 1744.98957,
      {
        (1, 0): [0.84147098, 0.54030231, 0.82843076, 0.56009149],
        (1567, 0): [0.60894838, -0.79320985, 0.09323163, -0.99564445],
      },
    ),
    (384, 122425.85788, {(1, 2): [0.81525065, 0.57910826]}),
  ],
)
def test_flat_sinusoid_has_the_published_values(dim, total, entries):
  table = positions.flat_sinusoid(np.arange(1568), dim)
  assert table.sum() == pytest.approx(total, abs=1e-4)
  for (row, start), values in entries.items():
    got = table[row, start : start + len(values)]
    np.testing.assert_allclose(got, values, atol=1e-8)
  fixed = positions.fixed_table('flat_sinusoid', dim, (8, 14, 14))
  np.testing.assert_array_equal(fixed, table.astype(np.float32))


def test_sincos_columns_code_their_axis():
  table = positions.sincos_3d((2, 3, 4), 16, uniform_power=False)
  table = table.reshape(2, 3, 4, 16)
  np.testing.assert_array_equal(table[:, 0, 0, :8], table[:, 2, 3, :8])
  np.testing.assert_array_equal(table[0, :, 0, 8:12], table[1, :, 3, 8:12])
  np.testing.assert_array_equal(table[0, 0, :, 12:], table[1, 2, :, 12:])
  h_first = positions.sincos_2d((2, 3), 8)
  w_first = positions.sincos_2d((2, 3), 8, first='w')
  np.testing.assert_array_equal(h_first[:, :4], w_first[:, 4:])
  assert positions.fixed_table('sincos_3d', 16, (2, 3, 4)).shape == (24, 16)
  flat = positions.fixed_table('sincos_2d', 8, (2, 2, 3))
  np.testing.assert_array_equal(flat[:6], flat[6:])


def test_sincos_3d_is_the_table_of_vjepa():
  for dim, total in ((1024, 754_948.13657), (384, 282_557.42167)):
    table = positions.sincos_3d((8, 14, 14), dim)
    assert table.sum() == pytest.approx(total, abs=1e-4)
    a = 2 * -(-dim // 6)
    for token, column in ((196, 0), (14, a), (1, 2 * a)):
      assert table[token, column] == pytest.approx(0.84147098, abs=1e-8)


def test_fit_table_interpolates_and_takes_images():
  ramp = np.arange(4.0).repeat(4)[:, None].astype(np.float32)
  out = positions.fit_table(ramp, (4, 2, 2), (2, 2, 2))
  np.testing.assert_allclose(out[:, 0], np.repeat([0.5, 2.5], 4), atol=1e-6)
  assert positions.fit_table(ramp, (4, 2, 2), (4, 2, 2)) is ramp
  table = positions.fixed_table('flat_sinusoid', 8, (4, 2, 2))
  image = positions.fit_table(table, (4, 2, 2), (1, 2, 2))
  np.testing.assert_array_equal(image, table[:4])
  image = positions.fit_table(table, (4, 2, 2), (1, 3, 3), 'sincos_2d')
  np.testing.assert_allclose(image, positions.sincos_2d((3, 3), 8), atol=1e-6)


def test_errors():
  with pytest.raises(ValueError, match='even number of columns, found 3'):
    positions.sincos_1d(np.arange(2), 3)
  with pytest.raises(ValueError, match='width that 4 divides, found 6'):
    positions.sincos_2d((2, 2), 6)
  with pytest.raises(ValueError, match="found 'x'"):
    positions.fixed_table('x', 8, (1, 1, 1))


def test_time_features():
  e = positions.time_features(np.array([0.0, 7.5]), 256)
  np.testing.assert_array_equal(e[0, :128], 1.0)
  np.testing.assert_array_equal(e[0, 128:], 0.0)
  assert e[1, 5] == pytest.approx(np.cos(7.5 * 10_000 ** (-5 / 128)), abs=1e-6)
  odd = positions.time_features(np.ones((2, 3)), 5)
  assert odd.shape == (2, 3, 5)
  assert not np.any(odd[..., -1])
