from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.ops import noise


def tables_of(schedule, steps=1000):
  return noise.tables(schedule(steps))


def test_published_values():
  s = tables_of(noise.linear)
  values = s.abar[[0, 500, 999]]
  np.testing.assert_allclose(
    values, [0.9999, 0.0777966584, 4.03582977e-5], rtol=1e-8
  )
  snr = s.abar / (1 - s.abar)
  np.testing.assert_allclose(snr[100], 8.53667, rtol=1e-6)
  assert np.argmax(snr <= 5) == 130
  s = tables_of(noise.cosine)
  np.testing.assert_allclose(
    s.abar[[500, 999]], [0.492285172, 2.4287669e-9], rtol=1e-8
  )
  assert np.argmax(s.abar / (1 - s.abar) <= 5) == 261
  assert np.flatnonzero(s.beta == 0.999).tolist() == [999]


@pytest.mark.parametrize('schedule', [noise.linear, noise.cosine])
@pytest.mark.parametrize('steps', [50, 1000])
def test_tables_are_consistent(schedule, steps):
  s = tables_of(schedule, steps)
  assert np.all(np.diff(s.abar) < 0)
  assert s.post_var[0] == 0
  assert np.all(np.isfinite(s.post_logvar))
  assert s.post_logvar[0] == s.post_logvar[1]
  np.testing.assert_allclose(np.exp(s.post_logvar[1:]), s.post_var[1:])
  # The posterior's mean of x_t = sqrt(abar_t) x0 is sqrt(abar_{t-1}) x0.
  mean = s.post_x0 + s.post_xt * np.sqrt(s.abar)
  np.testing.assert_allclose(mean, np.sqrt(s.abar_prev), rtol=1e-9)


def test_other_schedules():
  assert noise.linear(100)[-1] == pytest.approx(0.2)
  beta = noise.warmup(100, start=0.1, end=0.5, share=0.5)
  np.testing.assert_allclose(beta[[0, 49, 50, 99]], [0.1, 0.5, 0.5, 0.5])
  abar = np.cumprod(1 - noise.harmonic(10))
  np.testing.assert_allclose(abar, np.arange(9, -1, -1) / 10, atol=1e-15)
  quad = noise.quadratic(3, start=0.01, end=0.09)
  np.testing.assert_allclose(quad, [0.01, 0.04, 0.09])


def test_respacing():
  kept = noise.respacing(1000, '250')
  assert (len(kept), kept.sum()) == (250, 124_875)
  assert kept[:6].tolist() == [0, 4, 8, 12, 16, 20]
  assert kept[-4:].tolist() == [987, 991, 995, 999]
  assert noise.respacing(1000, '50')[:5].tolist() == [0, 20, 41, 61, 82]
  assert noise.respacing(1000, 'ddim50').tolist() == list(range(0, 1000, 20))
  assert noise.respacing(1000, '').tolist() == list(range(1000))
  # Sections of 4, 3 and 3 steps; a single step is a section's first.
  assert noise.respacing(10, '2,1,3').tolist() == [0, 3, 4, 7, 8, 9]
  assert noise.respacing(10, 'ddim1').tolist() == [0]


@pytest.mark.parametrize(
  ('spec', 'match'),
  [
    ('ddim999', "keeps exactly 999.*example to '999'"),
    ('600,1', 'cannot keep 600 of the 500 steps of section 0'),
    ('fast', "such as '', '250'"),
    ('0', "found '0'"),
  ],
)
def test_impossible_respacing(spec, match):
  with pytest.raises(ValueError, match=match):
    noise.respacing(1000, spec)


def test_weights():
  snr = jnp.array([0.1, 1.0, 5.0, 50.0])
  weigh = partial(noise.min_snr, gamma=5.0)
  np.testing.assert_allclose(weigh(snr, 'eps'), [1, 1, 1, 0.1], rtol=1e-6)
  np.testing.assert_allclose(weigh(snr, 'x0'), [0.1, 1, 5, 5], rtol=1e-6)
  # The error of v is that of x0 times 1 + SNR.
  np.testing.assert_allclose(weigh(snr, 'v') * (1 + snr), weigh(snr, 'x0'))
  np.testing.assert_allclose(
    noise.p2(snr, 'eps', gamma=0.5, k=2.0), (2 + np.asarray(snr)) ** -0.5
  )
  np.testing.assert_array_equal(noise.unit_weight(snr, 'v'), np.ones(4))
