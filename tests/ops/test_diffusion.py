import dataclasses
import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax import config
from vfm_jax.ops import noise
from vfm_jax.ops.diffusion import Gaussian, unit_range
from vfm_jax.ops.process import Process

SHAPE = (4, 3, 5, 2)
T = jnp.array([0, 1, 500, 999])


def draw(seed=0, channels=2):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=(*SHAPE[:-1], channels)), jnp.float32)


X0, EPS, VAR = unit_range(draw(1)), draw(2), draw(3)


def target(process):
  """Return the output of a network that knows x0 and eps."""
  a, b = (
    jnp.sqrt(jnp.asarray(z, jnp.float32))[T].reshape(-1, 1, 1, 1)
    for z in (process.tables.abar, 1 - process.tables.abar)
  )
  return {'eps': EPS, 'x0': X0, 'v': a * EPS - b * X0}[process.predicts]


def test_is_a_process_that_configs_hold():
  node = config.ref(
    Gaussian,
    schedule=config.bind(noise.cosine, cap=0.9),
    weight=config.bind(noise.min_snr, gamma=3.0),
  )
  process = config.build(node)
  assert isinstance(process, Process)
  assert process.tables.beta.max() == pytest.approx(0.9)
  assert pickle.loads(pickle.dumps(process)).num_kept == 1000
  with pytest.raises(config.ConfigError, match='predicts'):
    config.build(config.ref(Gaussian, predicts='noise'))


def test_respacing_keeps_the_noise_levels():
  process = Gaussian()
  spaced = process.respaced('50')
  kept = np.asarray(process.tables.abar)[spaced.kept]
  np.testing.assert_allclose(spaced.tables.abar, kept, rtol=1e-12)
  for a, b in zip(
    process.tables, noise.tables(noise.linear(1000)), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-15)
  t = jnp.array([0, 1, 49])
  assert spaced.original(t).tolist() == [0, 20, 999]
  assert spaced.model_time(t).dtype == jnp.float32
  with pytest.raises(ValueError, match=r'process\.respacing'):
    spaced.draw_time(jax.random.split(jax.random.key(0), 2))


def test_a_schedule_must_give_variances():
  with pytest.raises(ValueError, match=r'process\.schedule.*0\.01 to 2 for'):
    _ = Gaussian(steps=10).tables


def test_noise_index_spans_all_levels_for_any_number_of_steps():
  assert Gaussian().noise_index(T).tolist() == T.tolist()
  few = Gaussian(steps=11, schedule=noise.cosine)
  assert few.noise_index(jnp.array([0, 5, 10])).tolist() == [0, 500, 999]


def test_times_are_of_the_keys_alone():
  keys = jax.random.split(jax.random.key(0), 512)
  t = Gaussian(steps=10).draw_time(keys)
  np.testing.assert_array_equal(t[3:5], Gaussian(steps=10).draw_time(keys[3:5]))
  assert set(np.asarray(t).tolist()) == set(range(10))


def test_corrupts_with_unit_total_variance():
  process = Gaussian()
  x_t = process.corrupt(X0, EPS, T)
  np.testing.assert_allclose(x_t[0], X0[0], atol=0.04)
  np.testing.assert_allclose(x_t[3], EPS[3], atol=0.02)
  mean, var, logvar = process.marginal(X0, T)
  np.testing.assert_allclose(x_t, mean + jnp.sqrt(var) * EPS, rtol=1e-5)
  np.testing.assert_allclose(jnp.exp(logvar), var, rtol=1e-5)


@pytest.mark.parametrize('predicts', ['eps', 'x0', 'v'])
def test_a_knowing_network_gives_the_sample_and_the_noise(predicts):
  process = Gaussian(predicts=predicts)
  x_t = process.corrupt(X0, EPS, T)
  known = target(process)
  # v = -1 is the posterior's variance: nothing is left of the bound but the
  # likelihood of the pixels.
  output = jnp.concatenate([known, -jnp.ones_like(known)], -1)
  p = process.predict(output, x_t, T)
  np.testing.assert_allclose(p.x0, X0, atol=2e-4)
  np.testing.assert_allclose(p.eps, EPS, atol=2e-4)
  np.testing.assert_allclose(
    p.mean, process.posterior(X0, x_t, T)[0], atol=1e-5
  )
  loss, parts = process.loss(output, X0, EPS, x_t, T)
  np.testing.assert_allclose(parts['mse'], 0, atol=1e-10)
  np.testing.assert_allclose(parts['vb'][1:], 0, atol=1e-6)
  np.testing.assert_allclose(loss, parts['vb'], atol=1e-10)


def test_variances():
  x_t = draw(5)
  s = Gaussian().tables
  low, high = (
    jnp.asarray(z, jnp.float32)[T].reshape(-1, 1, 1, 1) + jnp.zeros(SHAPE)
    for z in (s.post_logvar, np.log(s.beta))
  )
  logvar = lambda p, out: p.predict(out, x_t, T).logvar  # noqa: E731
  both = lambda v: jnp.concatenate([x_t, jnp.full_like(x_t, v)], -1)  # noqa: E731
  np.testing.assert_allclose(logvar(Gaussian(), both(-1.0)), low, rtol=1e-6)
  np.testing.assert_allclose(logvar(Gaussian(), both(1.0)), high, rtol=1e-6)
  small, large = (
    jnp.broadcast_to(logvar(Gaussian(variance=v), x_t), SHAPE)
    for v in ('small', 'large')
  )
  np.testing.assert_allclose(small, low)
  np.testing.assert_allclose(large[1:], high[1:])
  np.testing.assert_allclose(large[0], low[0], rtol=1e-6)
  with pytest.raises(
    ValueError, match=r"variance` 'small', found \(4, 3, 5, 4"
  ):
    logvar(Gaussian(variance='small'), both(1.0))


def test_gradients_of_the_hybrid_loss_are_separate():
  process = Gaussian()
  x_t, output = process.corrupt(X0, EPS, T), draw(6, channels=4)

  def part(name):
    return jax.grad(
      lambda out: process.loss(out, X0, EPS, x_t, T)[1][name].sum()
    )(output)

  mse, vb = part('mse'), part('vb')
  np.testing.assert_array_equal(mse[..., 2:], 0)
  np.testing.assert_array_equal(vb[..., :2], 0)
  assert np.all(np.isfinite(vb))
  assert np.any(mse[..., :2])
  assert np.any(vb[..., 2:])


def test_criteria():
  x_t, output = Gaussian().corrupt(X0, EPS, T), draw(6, channels=4)
  loss = lambda **kw: Gaussian(**kw).loss(output, X0, EPS, x_t, T)  # noqa: E731
  total, parts = loss()
  np.testing.assert_allclose(total, parts['mse'] + parts['vb'])
  vb = loss(criterion='kl')[0]
  np.testing.assert_allclose(vb, parts['vb'], rtol=1e-6)
  np.testing.assert_allclose(loss(criterion='rescaled_kl')[0], 1000 * vb)
  spaced = Gaussian(criterion='rescaled_mse').respaced('50')
  t = jnp.array([0, 1, 25, 49])
  plain = dataclasses.replace(spaced, criterion='mse')
  got, want = (
    p.loss(output, X0, EPS, x_t, t)[1]['vb'] for p in (spaced, plain)
  )
  np.testing.assert_allclose(got, want * 50 / 1000, rtol=1e-6)


@pytest.mark.parametrize(
  'weight', [noise.min_snr, partial(noise.p2, gamma=0.5), noise.unit_weight]
)
def test_weights_scale_each_example_and_spare_the_bound(weight):
  # Four examples of width four: a weight must not follow the last dimension.
  x0, eps, output = (
    jnp.tile(z[:, :, :1], (1, 1, 4, 1)) for z in (X0, EPS, VAR)
  )
  output = jnp.concatenate([output, output], -1)
  x_t = Gaussian().corrupt(x0, eps, T)
  loss, parts = Gaussian(weight=weight).loss(output, x0, eps, x_t, T)
  snr = Gaussian().snr(T)
  expected = weight(snr, 'eps') * parts['mse'] + parts['vb']
  np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_restricting_acts_before_the_mean():
  process = Gaussian(variance='small')
  x_t = 3 * draw(7)
  p = process.predict(EPS, x_t, T, restrict=unit_range)
  assert np.abs(p.x0).max() <= 1
  np.testing.assert_allclose(p.mean, process.posterior(p.x0, x_t, T)[0])
  np.testing.assert_allclose(
    process.corrupt(p.x0, p.eps, T), x_t, rtol=1e-4, atol=1e-5
  )


def test_low_precision_outputs_are_scored_in_float32():
  process = Gaussian()
  output = draw(6, channels=4).astype(jnp.bfloat16)
  x_t = process.corrupt(X0, EPS, T)
  loss = process.loss(output, X0, EPS, x_t, T)[0]
  same = process.loss(output.astype(jnp.float32), X0, EPS, x_t, T)[0]
  np.testing.assert_array_equal(loss, same)
  assert loss.dtype == jnp.float32
