import itertools
import time

import jax
import numpy as np
import pytest

from vfm_jax import config
from vfm_jax.ops import clustering, noise
from vfm_jax.ops.clustering import affinity_cost, cluster, sequence_cost
from vfm_jax.ops.curriculum import Curriculum
from vfm_jax.ops.interpolants import Interpolant, logit_normal
from vfm_jax.ops.intervals import uniform
from vfm_jax.ops.strata import Stratified

RNG = np.random.default_rng(0)


def brute_force(cost, k):
  n = len(cost)
  best = np.inf
  for cuts in itertools.combinations(range(n - 1), k - 1):
    ends = (-1, *cuts, n - 1)
    total = sum(cost[a + 1, b] for a, b in itertools.pairwise(ends))
    best = min(best, total)
  return best


def total_cost(cost, last):
  ends = (-1, *last, len(cost) - 1)
  return sum(cost[a + 1, b] for a, b in itertools.pairwise(ends))


def slow_sequence_cost(s):
  n = len(s)
  out = np.zeros((n, n))
  for low in range(n):
    for high in range(low + 1, n):
      c = round((low + high + 1) / 2)
      out[low, high] = np.abs(s[low : high + 1] - s[c]).sum()
  return out


def test_costs_are_what_they_say():
  s = RNG.normal(size=9)
  upper = np.triu_indices(9)
  np.testing.assert_allclose(
    sequence_cost(s)[upper], slow_sequence_cost(s)[upper], atol=1e-12
  )
  m = RNG.normal(size=(9, 9))
  cost = affinity_cost(m)
  assert cost[2, 2] == -1
  np.testing.assert_allclose(cost[2, 3], -m[3, 2:4].sum())
  np.testing.assert_allclose(cost[2, 7], -m[5, 2:8].sum())


@pytest.mark.parametrize(('n', 'k'), [(1, 1), (4, 4), (7, 2), (10, 3), (10, 4)])
def test_finds_the_best_partition(n, k):
  for _ in range(20):
    # Whole numbers have ties and costs of 0.
    for s in (RNG.normal(size=n), RNG.integers(0, 3, n)):
      cost = sequence_cost(s)
      found = cluster(cost, k)
      assert len(found.last) == k - 1
      assert np.all(np.diff(found.last) > 0)
      np.testing.assert_allclose(found.cost, brute_force(cost, k), atol=1e-12)
      np.testing.assert_allclose(
        found.cost, total_cost(cost, found.last), atol=1e-12
      )
    cost = affinity_cost(RNG.normal(size=(n, n)))
    np.testing.assert_allclose(cluster(cost, k).cost, brute_force(cost, k))


def test_the_published_code_finds_less():
  s = np.array([9, 8.8, 8.7, 4, 3.9, 3.8, 1, 0.9, 0.5, 0.1])
  cost = sequence_cost(s)
  levels = np.arange(10) * 100
  best = cluster(cost, 3)
  assert best.cost == pytest.approx(1.9)
  assert best.last.tolist() == [2, 5]
  assert best.intervals(levels).bounds == (0, 250, 550, 1000)
  official = cluster(cost, 3, 'official')
  assert official.last.tolist() == [2, 5]
  # One lower, each.
  assert official.intervals(levels).bounds == (0, 200, 500, 1000)
  # A first interval of one element is not searched.
  s = np.array([9.0, 1, 1, 1])
  assert cluster(sequence_cost(s), 2).cost == 0
  assert cluster(sequence_cost(s), 2, 'official').cost > 0
  # And a total of 0 is taken for none.
  s = np.array([9.0, 9, 1, 1])
  assert cluster(sequence_cost(s), 2).last.tolist() == [1]
  assert cluster(sequence_cost(s), 2, 'official').last.tolist() == [2]


def inclusive(found):
  return [b - 1 for b in found.bounds[1:-1]]


def test_noise_levels_of_known_schedules():
  assert inclusive(clustering.by_log_snr(5)) == [152, 392, 622, 821]
  cosine = clustering.by_log_snr(5, schedule=noise.cosine)
  assert inclusive(cosine) == [132, 371, 652, 880]
  assert inclusive(clustering.by_snr(5)) == [0, 1, 6, 21]
  found = clustering.by_snr(5, schedule=noise.cosine)
  assert inclusive(found) == [0, 3, 11, 36]
  assert clustering.by_time(5) == uniform(5)
  assert clustering.by_log_snr(20).count == 20


def test_is_fast():
  cost = sequence_cost(np.arange(1000))
  start = time.process_time()
  cluster(cost, 8)
  assert time.process_time() - start < 1


def test_affinity_of_some_levels(tmp_path):
  # Two groups whose gradients are alike within, and levels 10 apart.
  group = np.arange(100) >= 30
  affinity = np.where(group[:, None] == group, 1.0, -0.5)
  path = tmp_path / 'affinity.npz'
  np.savez(path, levels=np.arange(100) * 10, affinity=affinity)
  assert clustering.by_affinity(str(path), 2).bounds == (0, 295, 1000)


def test_recipes_can_name_them():
  clusters = config.ref(clustering.by_log_snr, count=8, schedule=noise.cosine)
  built = config.build(config.ref(Stratified, intervals=clusters))
  assert built.intervals.count == 8
  assert config.build(config.ref(Curriculum, clusters=clusters)).clusters


def test_refuses():
  cost = sequence_cost(np.arange(4))
  with pytest.raises(ValueError, match=r'from 1 to 4, .* found 5'):
    cluster(cost, 5)
  with pytest.raises(ValueError, match="found 'best'"):
    cluster(cost, 2, 'best')
  with pytest.raises(ValueError, match='found no 4 intervals'):
    cluster(cost, 4, 'official')
  with pytest.raises(ValueError, match='each of 4 positions, found 1000'):
    cluster(cost, 2).intervals()


def test_equally_likely_intervals():
  found = clustering.by_density(20)
  assert found.count == 20
  # sigma / (1 + sigma) of levels is what the linear path has.
  rng = np.random.default_rng(0)
  sigma = np.exp(-1.2 + 1.2 * rng.normal(size=200_000))
  levels = np.rint(sigma / (1 + sigma) * 999)
  shares = np.histogram(levels, found.bounds)[0] / len(levels)
  np.testing.assert_allclose(shares, 1 / 20, atol=0.004)
  # A logit-normal density is symmetric, and has these for its quantiles.
  flow = Interpolant(density=logit_normal)
  even = clustering.by_density(4, mean=0.0, scale=1.0)
  assert even.bounds[1] + even.bounds[3] == even.bounds[2] * 2 == 1000
  t = jax.jit(flow.draw_time)(jax.random.split(jax.random.key(0), 20_000))
  shares = np.bincount(even.of(flow.noise_index(t))) / len(t)
  np.testing.assert_allclose(shares, 1 / 4, atol=0.01)
  # Of a schedule it is the level where the noise is as strong.
  half = clustering.by_density(2, mean=0.0, schedule=noise.linear).bounds[1]
  ratio = clustering.log_snr()[[half - 1, half]]
  assert ratio[0] > 0 > ratio[1]
  with pytest.raises(ValueError, match='without an empty interval'):
    clustering.by_density(800)
