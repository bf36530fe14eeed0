from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax import samplers
from vfm_jax.ops import noise
from vfm_jax.ops.diffusion import Gaussian, unit_range

MEAN, VAR = 0.5, 0.04
SHAPE = (4, 4, 2)
FIXED = Gaussian(variance='small')
KEYS = jax.random.split(jax.random.key(0), 8)


def even(steps):
  """Return a schedule whose log-SNR falls linearly from 5 to -5."""
  abar = 1 / (1 + np.exp(np.linspace(-5, 5, steps)))
  return 1 - abar / np.append(1.0, abar[:-1])


def exact(x, t, process=FIXED, var=VAR):
  """Return the expected noise in x_t when data is N(MEAN, var)."""
  abar = jnp.asarray(process.tables.abar, jnp.float32)[t].reshape(-1, 1, 1, 1)
  gap = x - jnp.sqrt(abar) * MEAN
  return jnp.sqrt(1 - abar) * gap / (abar * var + 1 - abar)


def learned(x, t):
  """Return an output with variance channels."""
  eps = exact(x, t)
  return jnp.concatenate([eps, jnp.tanh(x)], -1)


def draw(count=8, shape=SHAPE):
  return samplers.initial_noise(KEYS[:count], shape)


@pytest.mark.parametrize(
  'sample',
  [
    partial(samplers.ddpm, steps='10', restrict=unit_range),
    partial(samplers.ddim, steps='10', eta=0.5),
  ],
)
def test_samples_do_not_depend_on_the_batch(sample):
  run = jax.jit(partial(sample, learned, Gaussian()))
  whole = run(draw(), KEYS)
  assert whole.shape == (8, *SHAPE)
  one = run(draw()[3:4], KEYS[3:4])
  np.testing.assert_array_equal(one[0], whole[3])
  other = run(draw()[3:4], KEYS[4:5])
  assert not np.allclose(other[0], whole[3])


@pytest.mark.parametrize(
  ('sample', 'variance'),
  [
    (partial(samplers.ddpm, steps='200'), 'small'),
    (partial(samplers.ddpm, steps='200'), 'large'),
    (partial(samplers.ddim, steps='200', eta=1.0), 'small'),
    (partial(samplers.ddim, steps='200'), 'small'),
  ],
)
def test_an_exact_network_gives_back_the_data(sample, variance):
  keys = jax.random.split(jax.random.key(1), 64)
  x = samplers.initial_noise(keys, (8, 8, 2))
  process = Gaussian(variance=variance)
  got = np.asarray(jax.jit(partial(sample, exact, process))(x, keys))
  np.testing.assert_allclose(got.mean(), MEAN, atol=0.02)
  # Ancestral steps add up to a little too much noise with the large variance.
  np.testing.assert_allclose(got.var(), VAR, rtol=0.15)


def test_ddim_follows_a_known_noise_back():
  x0 = unit_range(draw())
  eps = samplers.stream(KEYS, 5, SHAPE)
  t = jnp.full(8, 999)
  known = lambda x, t: eps  # noqa: E731
  got = samplers.ddim(known, FIXED, FIXED.corrupt(x0, eps, t), KEYS, steps='20')
  np.testing.assert_allclose(got, x0, atol=1e-3)


def test_ddim_reverse_undoes_ddim():
  x0 = MEAN + np.sqrt(VAR) * draw()
  reverse = jax.jit(partial(samplers.ddim_reverse, exact, FIXED, steps='250'))
  noisy = reverse(x0)
  sigma = np.sqrt(FIXED.tables.abar[-1] * VAR + 1)
  np.testing.assert_allclose(np.std(noisy), sigma, rtol=0.1)
  back = samplers.ddim(exact, FIXED, noisy, KEYS, steps='250')
  np.testing.assert_allclose(back, x0, atol=0.06)


def test_full_noise_stays_finite_where_rounding_hurts():
  process = Gaussian(schedule=noise.cosine)
  sample = partial(samplers.ddim, learned, process, steps='9', eta=1.0)
  got = sample(draw(), KEYS, restrict=unit_range)
  assert np.all(np.isfinite(got))


def test_dpm_solver_is_of_second_order():
  process = Gaussian(schedule=even, variance='small')
  network, x = partial(exact, process=process, var=1.0), np.asarray(draw(2))

  def error(sample, steps):
    """Return the largest error at step 0 against the exact flow."""
    path = sample(network, process, x, steps=steps, record=lambda x, _: x)[1]
    # Data of variance 1 stays so under noise: only the mean moves.
    end, start = np.sqrt(process.respaced(steps).tables.abar[[0, -1]])
    return np.abs(path[-2] - (x + (end - start) * MEAN)).max()

  second = [error(samplers.dpm_solver, n) for n in ('20', '40', '80')]
  first = [error(samplers.ddim, n) for n in ('40', '80')]
  # Halving the steps' size quarters the error, where DDIM halves it.
  assert 3.6 < second[0] / second[1] < 4.4
  assert 3.6 < second[1] / second[2] < 4.4
  assert 1.8 < first[0] / first[1] < 2.2
  assert first[1] > 30 * second[2]


def test_solver_steps_are_those_of_ddim_where_x0_does_not_move():
  x0 = draw(2)

  def knows(x, t):
    return FIXED.noise_of(x0, x, t)

  run = dict(steps='8', record=lambda x, _: x)
  x = samplers.stream(KEYS[:2], 7, SHAPE)
  got, path = samplers.dpm_solver(knows, FIXED, x, **run)
  _, other = samplers.ddim(knows, FIXED, x, None, **run)
  np.testing.assert_allclose(path, other, atol=1e-4)
  np.testing.assert_allclose(got, x0, atol=1e-5)


def test_classifier_guidance_shifts_the_samples():
  # The gradient of log N(x; goal, 1) tilts the data to the product of both.
  guide = lambda x, t: 1.0 - x  # noqa: E731
  x = draw()

  @jax.jit
  def means(x):
    runs = [
      partial(sample, exact, FIXED, x, KEYS, steps='100')
      for sample in (samplers.ddpm, samplers.ddim)
    ]
    return [(run(guide=guide).mean(), run().mean()) for run in runs]

  for guided, unguided in means(x):
    assert guided > unguided + 0.01
  seen = []
  guide = lambda x, t: seen.append(t) or jnp.zeros_like(x)  # noqa: E731
  same = samplers.ddpm(exact, FIXED, x, KEYS, steps='10', guide=guide)
  plain = samplers.ddpm(exact, FIXED, x, KEYS, steps='10')
  np.testing.assert_allclose(same, plain, atol=1e-6)
  assert seen[0].dtype == jnp.int32


def test_recorded_noise_and_steps():
  x = draw(2)
  noises = jnp.stack(
    [samplers.stream(KEYS[:2], t + 1, SHAPE) for t in range(4, -1, -1)]
  )
  record = lambda x, p: (x, p.x0)  # noqa: E731
  run = partial(samplers.ddpm, learned, Gaussian(), x, steps='5')
  got, (xs, x0s) = run(None, noise=noises, record=record)
  np.testing.assert_allclose(got, run(KEYS[:2]), rtol=1e-6)
  np.testing.assert_array_equal(xs[-1], got)
  assert x0s.shape == (5, 2, *SHAPE)
  with pytest.raises(ValueError, match='each of the 5 steps, found 3'):
    run(None, noise=noises[:3])
  with pytest.raises(ValueError, match='expected `keys`'):
    run()


def test_strides():
  """The released loop of DMP leaves steps out without undoing their noise."""
  x, record = draw(2), lambda x, p: (x, p.x0)
  run = partial(samplers.ddim, exact, FIXED, x, steps='20', record=record)
  _, (every, _) = run()
  got, (xs, _) = run(stride=5)
  assert every.shape[0] == 20
  assert xs.shape[0] == 4
  np.testing.assert_array_equal(xs[0], every[0])  # step 19
  np.testing.assert_array_equal(xs[-1], got)
  assert np.abs(got - every[-1]).max() > 0.01
