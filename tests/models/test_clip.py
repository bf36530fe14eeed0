import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.models.clip import ClipViT
from vfm_jax.nn.transformer import stack_blocks, stack_sown

SMALL = dict(width=16, depth=2, heads=2, patch=4, features=12, image_size=8)
VIDEO = jax.random.normal(jax.random.key(0), (2, 3, 8, 8, 3))


@pytest.fixture(scope='module')
def params():
  shapes = jax.eval_shape(ClipViT(**SMALL).init, jax.random.key(1), VIDEO)
  rng = np.random.default_rng(0)
  draw = lambda s: np.float32(0.2 * rng.standard_normal(s.shape))  # noqa: E731
  return jax.tree.map(draw, shapes['params'])


# CLIP's towers, with the projection.
@pytest.mark.parametrize(
  ('size', 'total'), [('B/16', 86_192_640), ('L/14', 303_966_208)]
)
def test_parameter_counts(size, total):
  video = jax.ShapeDtypeStruct((1, 1, 224, 224, 3), jnp.float32)
  shapes = jax.eval_shape(ClipViT(size=size).init, jax.random.key(0), video)
  assert sum(x.size for x in jax.tree.leaves(shapes['params'])) == total


def test_frames_classes_subsets_and_scanned_layers(params):
  model = ClipViT(**SMALL)
  order = jnp.array([2, 0, 1])
  idx = jnp.array([[1, 7], [0, 11]])

  @jax.jit
  def run(params):
    given = {'params': params}
    taps, sown = model.apply(
      given, VIDEO, (0, -1), method='intermediate', mutable=['attention']
    )
    scanned = {'params': stack_blocks(params)}
    loop, looped = model.clone(scan=True).apply(
      scanned, VIDEO, mutable=['attention']
    )
    return {
      'whole': model.apply(given, VIDEO),
      'last': taps[-1],
      'attention': stack_sown(sown['attention'])['first_query'],
      'mixed': model.apply(given, VIDEO[:, order]),
      'some': model.apply(given, VIDEO, idx),
      'class': model.clone(output='class').apply(given, VIDEO),
      'loop': loop,
      'looped': stack_sown(looped['attention'])['first_query'],
    }

  out = run(params)
  whole = out['whole']
  assert whole.shape == (2, 12, 12)
  np.testing.assert_array_equal(whole, out['last'])
  # Two layers, six frames, the class token and four patches.
  assert out['attention'].shape == (2, 6, 5)
  np.testing.assert_allclose(out['attention'].sum(-1), 1, rtol=1e-6)
  want = whole.reshape(2, 3, 4, 12)[:, order].reshape(2, 12, 12)
  np.testing.assert_allclose(out['mixed'], want, atol=1e-5)
  assert out['class'].shape == (2, 3, 12)
  np.testing.assert_allclose(out['some'][1], whole[1, idx[1]], atol=1e-6)
  np.testing.assert_allclose(out['loop'], whole, atol=1e-5)
  np.testing.assert_allclose(out['looped'], out['attention'], atol=1e-6)


def test_other_sizes_and_no_projection(params):
  def shape(model, *size):
    video = jnp.zeros((2, 3, *size, 3))
    run = lambda x: model.apply({'params': params}, x)  # noqa: E731
    return jax.eval_shape(run, video).shape

  assert shape(ClipViT(**{**SMALL, 'features': 0}), 8, 8) == (2, 12, 16)
  assert shape(ClipViT(**SMALL), 16, 12) == (2, 36, 12)
