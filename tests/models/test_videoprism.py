import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.models.videoprism import VideoPrism
from vfm_jax.models.videoprism_clip import TextTower, VideoPrismClip
from vfm_jax.nn.transformer import stack_blocks

TINY = dict(width=16, spatial_depth=1, temporal_depth=2, heads=2, mlp_width=16)
TINY |= dict(patch=4, frames=3, image_size=8)


@pytest.fixture(scope='module')
def made():
  model = VideoPrism(**TINY)
  video = jax.random.uniform(jax.random.key(0), (1, 3, 8, 8, 3))
  params = jax.jit(model.init)(jax.random.key(1), video)
  apply = jax.jit(functools.partial(model.apply, method='stages'))
  return lambda *args: apply(params, *args), video


def by_frame(x):
  return np.asarray(x).reshape(3, 4, -1)


def test_the_first_stage_sees_frames_alone(made):
  stages, video = made
  spatial, final = stages(video)
  shuffled, moved = stages(video[:, [2, 0, 1]])
  want = by_frame(spatial)[[2, 0, 1]]
  np.testing.assert_allclose(by_frame(shuffled), want, atol=1e-5)
  # The last one knows the place in time.
  assert np.abs(by_frame(moved) - by_frame(final)[[2, 0, 1]]).max() > 1e-2


def test_the_second_stage_sees_patches_alone(made):
  stages, video = made
  other = video.at[:, 1, :4, :4].set(0.0)
  a, b = (by_frame(stages(x)[0]) for x in (video, other))
  np.testing.assert_array_equal(np.abs(a - b).max((1, 2)) > 0, [0, 1, 0])
  # Without a first stage the patch alone changes, at all times.
  model = VideoPrism(**TINY | dict(spatial_depth=0))
  params = jax.jit(model.init)(jax.random.key(1), video)
  apply = jax.jit(model.apply)
  a, b = (by_frame(apply(params, x)) for x in (video, other))
  changed = np.abs(a - b).max(-1) > 1e-6
  np.testing.assert_array_equal(changed, [[True, False, False, False]] * 3)


def test_a_frame_that_only_fills_up_changes_no_other(made):
  stages, video = made
  valid = jnp.array([[True, True, False]])
  a, b = (
    by_frame(stages(x, valid)[1]) for x in (video, video.at[:, 2].set(0.0))
  )
  np.testing.assert_allclose(a[:2], b[:2], atol=1e-6)


@pytest.mark.slow
def test_scanned_blocks_give_the_same():
  model = VideoPrism(**TINY)
  video = jax.random.uniform(jax.random.key(0), (1, 3, 8, 8, 3))
  params = model.init(jax.random.key(1), video)['params']
  want = model.apply({'params': params}, video)
  stacked = {'params': stack_blocks(params)}
  got = model.clone(scan=True).apply(stacked, video)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_texts_see_no_future_and_no_padding():
  tower = TextTower(vocabulary=9, width=16, heads=2, depth=1)
  ids = jnp.array([[1, 2, 3, 4]])
  valid = jnp.array([[True, True, True, False]])
  params = jax.jit(tower.init)(jax.random.key(0), ids, valid)
  apply = jax.jit(tower.apply)
  want = apply(params, ids, valid)
  padded = apply(params, ids.at[0, 3].set(7), valid)
  np.testing.assert_allclose(padded, want, atol=1e-6)
  assert np.abs(apply(params, ids.at[0, 2].set(7), valid) - want).max() > 1e-3


def test_texts_need_a_tower():
  model = VideoPrismClip(VideoPrism(**TINY), auxiliary_depth=0)
  ids = jnp.zeros((1, 2), jnp.int32)
  with pytest.raises(ValueError, match=r'encoder\.text.*found None'):
    model.apply({'params': {}}, ids, ids > 0, method='embed_text')
