import functools

import flax.linen as nn
import numpy as np
import pytest
from PIL import Image

from vfm_jax.data import augment, clips
from vfm_jax.data.digits import Digits
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.evals import base, marginals
from vfm_jax.evals.marginals import RelativeEntropy
from vfm_jax.objectives.denoise import Denoise
from vfm_jax.ops.diffusion import Gaussian
from vfm_jax.ops.interpolants import Interpolant
from vfm_jax.ops.intervals import Intervals

DATA = Pipeline(
  Digits(split='val', val_per_class=4),
  functools.partial(clips.uniform, frames=1),
  augment.identity,
  path='data.val',
)


def test_relative_entropy_is_that_of_normal_marginals():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(50, 3)) @ rng.normal(size=(3, 3)) + [1, -2, 0.5]
  alpha, sigma = np.array([0.9, 0.5, 0.1]), np.array([0.3, 0.8, 0.95])
  got = marginals.relative_entropy(x, alpha, sigma)
  cov = np.cov(x.T, bias=True)
  for i in range(2):
    a, b = (alpha[j] ** 2 * cov + sigma[j] ** 2 * np.eye(3) for j in (i, i + 1))
    inverse = np.linalg.inv(b)
    gap = (alpha[i + 1] - alpha[i]) * x.mean(0)
    kl = np.trace(inverse @ a) - 3 + gap @ inverse @ gap
    kl += np.linalg.slogdet(b)[1] - np.linalg.slogdet(a)[1]
    np.testing.assert_allclose(got[i], kl / 2 / 3)
  # Fewer examples than dimensions.
  wide = np.concatenate([x[:2], np.ones((2, 5))], axis=1)
  got = marginals.relative_entropy(wide, alpha, sigma)
  cov = np.cov(wide.T, bias=True)
  a, b = (alpha[j] ** 2 * cov + sigma[j] ** 2 * np.eye(8) for j in (0, 1))
  gap = (alpha[1] - alpha[0]) * wide.mean(0)
  kl = np.trace(np.linalg.inv(b) @ a) - 8 + gap @ np.linalg.inv(b) @ gap
  kl += np.linalg.slogdet(b)[1] - np.linalg.slogdet(a)[1]
  np.testing.assert_allclose(got[0], kl / 2 / 8)


def test_clean_steps_of_digits_differ_most():
  with DATA.eval_batches(40) as found:
    x = next(found)['video'] / 127.5 - 1
  got = marginals.relative_entropy(x, *marginals.coefficients(Gaussian()))
  assert np.all(got >= 0)
  thirds = [part.sum() for part in np.array_split(got, 3)]
  assert thirds[0] > 10 * thirds[1] > 10 * thirds[2]


def test_coefficients_of_processes():
  abar = Gaussian().tables.abar
  alpha, sigma = marginals.coefficients(Gaussian())
  np.testing.assert_allclose(alpha, np.sqrt(abar), rtol=1e-6)
  np.testing.assert_allclose(sigma, np.sqrt(1 - abar), rtol=1e-6)
  alpha, sigma = marginals.coefficients(Interpolant())
  np.testing.assert_allclose(alpha + sigma, 1, rtol=1e-6)
  assert np.all(np.diff(sigma) > 0)
  np.testing.assert_allclose(sigma, np.arange(1000) / 999, atol=1e-3)
  with pytest.raises(ValueError, match=r'`relative entropy`, found none'):
    marginals.coefficients(Gaussian(steps=500))


def test_evaluates_and_draws(tmp_path):
  evaluator = RelativeEntropy(DATA, Intervals((0, 10, 1000)), 30, 20)
  assert isinstance(evaluator, base.Evaluator)
  inside = evaluator.in_run(str(tmp_path), 'entropy')
  objective = Denoise(nn.Module(), Gaussian(), data='video', label=None)
  got = inside.run(objective, {}, seed=0)
  assert list(got) == ['entropy30_0-9', 'entropy30_10-999']
  assert got['entropy30_0-9'] > got['entropy30_10-999'] > 0
  with Image.open(tmp_path / 'evals/entropy/entropy.png') as picture:
    assert min(picture.size) > 300
  with pytest.raises(
    TypeError, match=r'RelativeEntropy needs config.objective'
  ):
    evaluator.run(object(), {}, seed=0)
