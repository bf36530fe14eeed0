import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax import trees
from vfm_jax.models.temporal_localization import TemporalDetector
from vfm_jax.models.temporal_pyramid import Pyramid


@functools.cache
def tiny():
  """Return a tiny detector, noisy parameters, and its compiled call."""
  model = TemporalDetector(
    2, Pyramid((5, -1), width=8, heads=2, embed=1, stem=1), head_width=8
  )
  shapes = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 8, 3)), jnp.ones((1, 8), bool)
  )
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda s: rng.normal(0, 0.5, s.shape).astype(np.float32), shapes
  )
  return model, params, jax.jit(model.apply)


def run(x, mask):
  _, params, apply = tiny()
  return jax.device_get(apply(params, x, mask))


def test_hidden_steps_and_longer_padding_change_nothing():
  x = np.random.default_rng(1).normal(size=(1, 32, 3)).astype(np.float32)
  mask = np.arange(32)[None] < 13
  found = run(x, mask)
  x[:, 13:] = 7
  other = run(x, mask)
  # Every level has at least one padded step at either length.
  short = run(x[:, :16], mask[:, :16])
  for level in range(2):
    for a, b, c in zip(
      found.logits + found.offsets,
      other.logits + other.offsets,
      short.logits + short.offsets,
      strict=True,
    ):
      np.testing.assert_array_equal(a, b)
      n = c.shape[1] - 1
      np.testing.assert_allclose(a[:, :n], c[:, :n], atol=1e-5)
    expected = mask[:, :: 2**level]
    np.testing.assert_array_equal(found.masks[level], expected)
    assert (found.offsets[level] >= 0).all()


def test_a_video_without_a_step_gives_numbers():
  found = run(np.zeros((1, 32, 3), np.float32), np.zeros((1, 32), bool))
  assert all(np.isfinite(x).all() for x in found.logits + found.offsets)


@pytest.mark.parametrize(
  ('classes', 'expected'), [(1, 7_336_713), (20, 7_351_324), (200, 7_489_744)]
)
def test_parameter_counts(classes, expected):
  shapes = jax.eval_shape(
    TemporalDetector(classes).init,
    jax.random.key(0),
    jnp.zeros((1, 32, 1024)),
    jnp.ones((1, 32), bool),
  )
  leaves = [leaf for _, leaf in trees.path_leaves(shapes)]
  assert sum(leaf.size for leaf in leaves) == expected


def test_divisors_of_the_released_settings():
  anet = Pyramid((7, 7, 7, 7, 7, -1))
  assert TemporalDetector(20).divisor == 576
  assert TemporalDetector(1, anet).divisor == 96


def test_a_new_head_is_unsure():
  pyramid = Pyramid((1,), width=4, embed=1, stem=1, block='conv')
  model = TemporalDetector(2, pyramid, head_width=4, head_layers=1)
  inputs = jnp.zeros((1, 4, 3)), jnp.ones((1, 4), bool)
  params = jax.jit(model.init)(jax.random.key(0), *inputs)['params']
  found = jax.jit(model.apply)({'params': params}, *inputs)
  np.testing.assert_allclose(jax.nn.sigmoid(found.logits[0]), 0.01, rtol=1e-5)
