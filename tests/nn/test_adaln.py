import jax
import numpy as np
import pytest

from vfm_jax.nn import adaln

RNG = np.random.default_rng(0)
H = RNG.normal(size=(2, 16, 16)).astype(np.float32)
CONTEXT = adaln.Context(c=RNG.normal(size=(2, 1, 16)).astype(np.float32))


def run(module, params, *args):
  return jax.jit(module.apply)({'params': params}, *args)


def lively(module, *args):
  """Return parameters with nothing at zero."""
  shapes = jax.eval_shape(module.init, jax.random.key(0), *args)['params']
  draw = lambda s: 0.2 * RNG.normal(size=s.shape).astype(np.float32)  # noqa: E731
  return jax.tree.map(draw, shapes)


def test_a_block_is_the_identity_and_the_end_is_zero_at_first():
  block = adaln.AdaLNBlock(heads=2, mlp_width=64)
  out, _ = jax.jit(block.init_with_output)(jax.random.key(0), H, CONTEXT)
  np.testing.assert_array_equal(out, H)
  final = adaln.FinalLayer(6)
  out, _ = jax.jit(final.init_with_output)(jax.random.key(0), H, CONTEXT.c)
  assert out.shape == (2, 16, 6)
  assert not np.any(out)


def test_modulate_and_slices():
  shift, scale = RNG.normal(size=(2, 2, 4, 16)).astype(np.float32)
  out = adaln.modulate(H, shift, scale)
  repeat = lambda v: np.repeat(v, 4, axis=1)  # noqa: E731
  want = H * (1 + repeat(scale)) + repeat(shift)
  np.testing.assert_allclose(out, want, atol=1e-6)


@pytest.mark.parametrize('kept', [16, 8])
def test_mask_hook(kept):
  block = adaln.AdaLNBlock(2, 64)
  params = lively(block, H, CONTEXT)
  m = np.arange(16) < kept
  masked = block.clone(hooks=adaln.Hooks(mask=lambda layer, x, context: m))
  got = run(masked, params, H, CONTEXT)
  want = run(block, params, m * H, CONTEXT) + (1 - m) * H
  np.testing.assert_allclose(got, want, atol=1e-6)
  # What is masked goes around the block.
  step = np.where(m, 0.0, 0.5).astype(np.float32)
  moved = run(masked, params, H + step, CONTEXT)
  np.testing.assert_allclose(moved, got + step, atol=1e-6)
  if kept < 16:  # ... and receives what the block adds.
    assert np.abs(got - H)[..., kept:].min() > 0


def test_labels_and_times():
  label = adaln.LabelEmbed(3, 8)
  params = lively(label, np.array([0]))
  out = run(label, params, np.array([2, 0, 3]))
  np.testing.assert_array_equal(out[:2], params['table'][[2, 0]])
  assert np.isnan(out[2]).all()
  time = adaln.TimeEmbed(8)
  params = lively(time, np.ones(2))
  t = np.array([[1.0, 5.0], [700.0, 2.5]], np.float32)
  out = run(time, params, t)
  assert out.shape == (2, 2, 8)
  again = run(time, params, t.ravel())
  np.testing.assert_allclose(out.reshape(4, 8), again, atol=1e-6)
