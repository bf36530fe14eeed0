"""Check the network and the losses of temporal action segmentation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax import trees
from vfm_jax.models import temporal_segmentation as tas


def rows_seen(length, reach, window):
  """Return which values reach each query, bool [L, L]."""
  x = np.ones((1, length, 2), np.float32)
  valid = np.ones((1, length), bool)
  # The value of frame i is the i-th unit vector: what comes out are weights.
  values = np.eye(length, dtype=np.float32)[None]
  run = jax.jit(tas.sliding, static_argnums=(4, 5))
  return np.asarray(run(x, x, values, valid, reach, window))[0] > 0


def test_released_window_is_the_same_for_a_whole_block():
  seen = rows_seen(13, 4, 'block')
  for t in range(13):
    first = 4 * (t // 4) - 2
    expected = np.isin(np.arange(13), np.arange(first, first + 7))
    np.testing.assert_array_equal(seen[t], expected)


def test_window_follows_the_query():
  seen = rows_seen(13, 4, 'query')
  for t in range(13):
    expected = np.isin(np.arange(13), np.arange(t - 2, t + 2))
    np.testing.assert_array_equal(seen[t], expected)


def test_windows_at_the_ends_of_the_scale():
  np.testing.assert_array_equal(rows_seen(3, 1, 'block'), np.eye(3) > 0)
  np.testing.assert_array_equal(rows_seen(3, 1, 'query'), np.eye(3) > 0)
  # A block that is longer than the video: 0 .. min(L - 1, l + l // 2 - 2).
  assert rows_seen(5, 8, 'block').all()
  assert rows_seen(5, 4, 'block')[0].all()


def test_what_is_not_seen_keeps_a_soft_weight_in_the_released_code():
  q = k = jnp.zeros((1, 2, 3))
  v = jnp.ones((1, 2, 3))
  seen = jnp.array([[[True, False]]])
  hard = tas.attend(q, k, v, seen, False)
  soft = tas.attend(q, k, v, seen, True)
  np.testing.assert_allclose(hard, 1.0)
  share = (1 + 1e-6) / (1 + 2e-6)
  np.testing.assert_allclose(soft, share, rtol=1e-6)
  assert (np.asarray(tas.attend(q, k, v, ~seen & seen, False)) == 0).all()


@pytest.mark.parametrize(
  ('classes', 'attend', 'count'),
  [
    (19, 'sliding', 12_917_068),
    pytest.param(11, 'sliding', 12_902_700, marks=pytest.mark.slow),
    pytest.param(48, 'full', 12_969_152, marks=pytest.mark.slow),
  ],
)
def test_sizes_are_those_of_the_released_heads(classes, attend, count):
  head = tas.Segmenter(num_classes=classes, attend=attend)
  shapes = jax.eval_shape(
    head.init,
    jax.random.key(0),
    jnp.zeros((1, 4, 1024)),
    jnp.ones((1, 4), bool),
  )
  assert sum(x.size for x in jax.tree.leaves(shapes)) == count


@pytest.fixture(scope='module')
def small():
  head = tas.Segmenter(num_classes=3, width=8, depth=2, decoders=1)
  x = jax.random.normal(jax.random.key(1), (1, 11, 5))
  params = jax.jit(head.init)(jax.random.key(0), x, jnp.ones((1, 11), bool))
  return head, params, x


@pytest.mark.parametrize(
  ('window', 'attend'),
  [
    ('block', 'sliding'),
    pytest.param('query', 'sliding', marks=pytest.mark.slow),
    ('query', 'full'),
  ],
)
def test_padding_changes_nothing(small, window, attend):
  """And without padding the released way to count it makes no difference."""
  head, params, x = small
  head = head.clone(window=window, attend=attend)
  padded = jnp.pad(x, ((0, 0), (0, 6), (0, 0)), constant_values=7.0)
  valid = jnp.arange(17)[None] < 11
  out = jax.jit(head.apply)(params, padded, valid)
  released = jax.jit(head.clone(padding='included').apply)
  expected = released(params, x, valid[:, :11])
  np.testing.assert_allclose(out[:, :, :11], expected, atol=2e-5)
  assert (np.asarray(out[:, :, 11:]) == 0).all()
  # The released way lets padding in.
  leaks = released(params, padded, valid)[:, :, :11]
  assert np.abs(leaks - expected).max() > 1e-2


def test_later_decoders_trust_attention_less():
  head = tas.Segmenter(num_classes=3, decoders=3)
  stages = head.bind({}).refine
  alphas = [stage.alpha for stage in stages]
  np.testing.assert_allclose(alphas, [1.0, 0.0497871, 0.00247875], rtol=1e-5)


def test_smoothing_loss():
  valid = jnp.ones((1, 3), bool)
  y = jnp.zeros((1, 3), int)

  @functools.partial(jax.jit, static_argnames='padding')
  def smooth(logits, valid=valid, **kwargs):
    return tas.losses(logits, y, valid, **kwargs)[1].sum()

  assert smooth(jnp.ones((1, 1, 3, 2))) == 0
  jump = jnp.array([[0.0, 0.0], [0.0, 60.0], [0.0, 60.0]])[None, None]
  # One of 2 steps, one of 2 classes beyond the cap, the other log(2)^2.
  expected = (16 + np.log(2) ** 2) / 4
  np.testing.assert_allclose(smooth(jump), expected, rtol=1e-5)
  # The gradient reaches the later frame of a step alone.
  logits = jnp.array([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])[None, None]
  grad = jax.jit(jax.grad(smooth))(logits)[0, 0]
  assert (np.asarray(grad[0]) == 0).all()
  assert (np.asarray(grad[1]) != 0).all()
  # Steps that end in padding count in the released mean alone.
  short = jnp.array([[True, True, False]])
  np.testing.assert_allclose(
    smooth(jump, short), 2 * smooth(jump, short, padding='included')
  )


def test_cross_entropy_is_the_mean_over_valid_frames():
  logits = jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5], [0.9, 0.1]]))
  entropy, _ = tas.losses(
    logits[None, None],
    jnp.array([[1, 0, -100]]),
    jnp.array([[True, True, False]]),
  )
  expected = -(np.log(0.75) + np.log(0.5)) / 2
  np.testing.assert_allclose(entropy, [expected], rtol=1e-6)


def test_norm_takes_no_scale_or_shift():
  x = jax.random.normal(jax.random.key(0), (1, 9, 3))
  counted = jnp.ones((1, 9), bool)
  np.testing.assert_allclose(
    tas._standardise(100 * x + 5, counted),
    tas._standardise(x, counted),
    atol=1e-3,
  )


def test_error_names_what_does_not_divide():
  head = tas.Segmenter(num_classes=2, width=9)
  with pytest.raises(ValueError, match=r'head.reduction=2 divides, found 9'):
    head.init(jax.random.key(0), jnp.zeros((1, 2, 1)), jnp.ones((1, 2), bool))


def test_names_of_parameters(small):
  paths = [p for p, _ in trees.path_leaves(small[1]['params'])]
  assert 'decoder_0/layer_1/attention/value/kernel' in paths
