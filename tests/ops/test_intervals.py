"""Tests of ops/intervals.py."""

import numpy as np
import pytest

from vfm_jax.ops import intervals


@pytest.mark.parametrize('count', [1, 3, 5, 8])
def test_partitions_all_levels(count):
  cut = intervals.uniform(count)
  levels = np.arange(1000)
  which = np.asarray(cut.of(levels))
  assert cut.count == count
  np.testing.assert_array_equal(np.unique(which), np.arange(count))
  assert (np.diff(which) >= 0).all()
  low, high = cut.range_of(which)
  assert ((low <= levels) & (levels < high)).all()


def test_puts_an_edge_into_the_interval_that_it_starts():
  cut = intervals.between([250, 600])
  levels = np.asarray([0, 249, 250, 599, 600, 999])
  np.testing.assert_array_equal(cut.of(levels), [0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize(
  'bounds', [(0,), (0, 10), (5, 1000), (0, 7, 7, 1000), (0, 9, 3, 1000)]
)
def test_refuses_what_is_no_partition(bounds):
  with pytest.raises(ValueError, match='ascend from 0 to 1000'):
    intervals.Intervals(bounds)
