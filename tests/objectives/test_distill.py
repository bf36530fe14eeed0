import dataclasses
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import save_file

from vfm_jax import step
from vfm_jax.models.clip import ClipViT
from vfm_jax.models.encoders import VideoViT
from vfm_jax.objectives import base, frozen
from vfm_jax.objectives.distill import Distill, distance
from vfm_jax.objectives.teachers import ClipTeacher
from vfm_jax.ops import guided, masking

TOWER = ClipViT(width=16, depth=2, heads=2, patch=4, features=12, image_size=8)
TEACHER = ClipTeacher(TOWER, seed=3, taps=(-2, -1))
ENCODER = VideoViT(
  width=16, depth=2, heads=2, patch=4, tubelet=2, frames=4, image_size=16,
  drop_path=0.1,
)  # fmt: skip
OBJECTIVE = Distill(
  encoder=ENCODER,
  teacher=TEACHER,
  mask=guided.AttentionGuided(0.5),
  image_mask=functools.partial(masking.tube, ratio=0.25),
  taps=(-2, -1),
)
BATCH = {
  'video': jax.random.randint(
    jax.random.key(0), (2, 4, 16, 16, 3), 0, 256
  ).astype(jnp.uint8),
  'row': jnp.arange(2),
}


def fill(shapes):
  """Return random numbers: compiling what draws them takes longer."""
  rng = np.random.default_rng(0)
  draw = lambda s: np.float32(0.2 * rng.standard_normal(s.shape))  # noqa: E731
  return jax.tree.map(draw, shapes)


@pytest.fixture(scope='module')
def params():
  params, extra = jax.eval_shape(OBJECTIVE.init, jax.random.key(0), BATCH)
  assert extra == {}
  assert set(params) == {'encoder', 'heads'}
  return fill(params)


@pytest.fixture(scope='module')
def teachers():
  return fill(OBJECTIVE.teacher_spec())


def test_protocols():
  assert isinstance(OBJECTIVE, base.Objective)
  assert isinstance(OBJECTIVE, base.Embeds)
  assert isinstance(OBJECTIVE, base.EmbedsTokens)
  assert isinstance(OBJECTIVE, frozen.Taught)


def test_loss_and_what_gets_a_gradient(params, teachers):
  def loss(given, batch=BATCH):
    out = OBJECTIVE.loss(given, {}, batch, jax.random.key(1), train=True)
    return (out.sums / out.counts)[0], out

  given = {**params, **teachers}
  (value, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(given)
  # Two examples, two slices, 16 - 8 cells.
  assert float(out.counts[0]) == 2 * 2 * 8
  assert 0 < value < 4
  np.testing.assert_allclose(out.metrics['distill_l2'], value, rtol=1e-6)
  assert not any(np.any(x) for x in jax.tree.leaves(grads['teacher']))
  for name in ('encoder', 'heads'):
    assert all(np.any(x) for x in jax.tree.leaves(grads[name]))
  with pytest.raises(ValueError, match=r'weights of the teacher beside'):
    OBJECTIVE.loss(params, {}, BATCH, jax.random.key(1), train=True)


@pytest.mark.slow
def test_images_have_a_mask_of_their_own(params, teachers):
  image = {**BATCH, 'video': BATCH['video'][:, :1]}
  out = jax.jit(
    lambda given: OBJECTIVE.loss(
      given, {}, image, jax.random.key(1), train=True
    )
  )({**params, **teachers})
  # One slice, of 16 - 4 cells.
  assert float(out.counts[0]) == 2 * 12
  assert np.isfinite(out.sums).all()


def test_targets_line_up_with_the_tokens(teachers):
  """A change of one cell of one slice is largest in its own targets."""
  video = OBJECTIVE.pixels_of(BATCH)
  grid = OBJECTIVE.grid(video)
  assert grid == (2, 4, 4)

  @functools.partial(jax.jit, static_argnums=1)
  def targets(video, slices):
    teacher = dataclasses.replace(TEACHER, slices=slices)
    return teacher.targets(teachers['teacher'], video, grid)

  want = targets(video, 'mean')
  assert want.features.shape == (2, 2, 32, 12)
  assert want.attention.shape == (2, 32)
  assert float(want.attention.sum()) < 2 * 2
  np.testing.assert_allclose(
    np.linalg.norm(want.features, axis=-1), 1, rtol=1e-5
  )
  # Token 16 + 4 * 2 + 1: slice 1, row 2, column 1.
  other = video.at[:, 2:, 8:12, 4:8].set(1.0 - video[:, 2:, 8:12, 4:8])
  moved = np.asarray(targets(other, 'mean').features - want.features)
  size = np.abs(moved).sum((0, 1, 3))
  assert not size[:16].any()
  assert int(size.argmax()) == 16 + 4 * 2 + 1
  # The second frame of a slice speaks in the mean only.
  late = video.at[:, 3].set(0.0)
  first = [targets(v, 'first').features for v in (video, late)]
  np.testing.assert_array_equal(*first)
  assert np.abs(targets(late, 'mean').features - want.features).max() > 1e-3


def test_hidden_pixels_change_the_targets_only(params, teachers):
  video = OBJECTIVE.pixels_of(BATCH)
  idx = jnp.array([[0, 5, 17], [1, 2, 30]])

  @jax.jit
  def run(video):
    _, tapped = OBJECTIVE.encode(params, video, idx)
    seen = OBJECTIVE.targets(teachers, video)
    return OBJECTIVE.predict(params, video, tapped, idx), seen.features

  want, seen = run(video)
  assert want.shape == (2, 2, 3, 12)
  # Token 3 (slice 0, row 0, column 3) is hidden in both.
  got, other = run(video.at[:, :2, :4, 12:].set(0.5))
  np.testing.assert_array_equal(got, want)
  assert np.abs(other - seen).max() > 1e-3


def test_distances():
  s = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
  s /= np.linalg.norm(s, axis=-1, keepdims=True)
  np.testing.assert_allclose(distance(s, s, 'l2'), 0, atol=1e-6)
  np.testing.assert_allclose(distance(s, -s, 'l2'), 4, atol=1e-6)
  np.testing.assert_allclose(distance(s, -s, 'mse'), 4 / 5, atol=1e-6)
  x, y = jnp.zeros((1, 1, 1, 2)), jnp.array([[[[0.5, 3.0]]]])
  want = (0.5 * 0.25 + 2.5) / 2
  np.testing.assert_allclose(distance(x, y, 'smooth_l1'), want)
  # Layers are paired in order.
  assert not np.allclose(distance(s, s[::-1], 'l2'), 0, atol=1e-3)


def test_teachers_are_neither_trained_nor_in_the_state(teachers):
  tx = optax.sgd(0.1)
  small = dataclasses.replace(
    OBJECTIVE,
    encoder=ENCODER.clone(depth=1),
    teacher=dataclasses.replace(TEACHER, taps=(-1,)),
    taps=(-1,),
  )
  init = functools.partial(step.init_state, small, tx)
  state = jax.eval_shape(init, 0, BATCH)
  assert 'teacher' not in state.params
  assert 'teacher' not in state.extra
  make = step.make_train_step(small, tx, accum=2)
  new, metrics = jax.eval_shape(make, state, BATCH, teachers)
  assert jax.tree.structure(new) == jax.tree.structure(state)
  assert 'distill_l2' in metrics
  with pytest.raises(ValueError, match='weights of the teacher beside'):
    jax.eval_shape(make, state, BATCH)


def test_embeddings_are_of_the_whole_clip(params):
  tokens = jax.jit(OBJECTIVE.tokens)(params, BATCH)
  assert tokens.shape == (2, 32, 16)
  assert tokens.dtype == jnp.float32
  shape = jax.eval_shape(OBJECTIVE.embed, params, BATCH).shape
  assert shape == (2, 16)


def test_weights_come_from_a_file_or_a_seed(tmp_path):
  with pytest.raises(ValueError, match=r'`objective\.teacher\.path`, or'):
    ClipTeacher(TOWER).weights()
  with pytest.raises(ValueError, match=r"found 'x\.npz' and 1"):
    ClipTeacher(TOWER, path='x.npz', seed=1).weights()
  file = tmp_path / 'tower.safetensors'
  save_file({'conv1.weight': np.zeros((16, 3, 4, 4), np.float32)}, file)
  with pytest.raises(ValueError, match='missing: ln_post'):
    ClipTeacher(TOWER, path=str(file)).weights()
  teacher = ClipTeacher(TOWER.clone(depth=1), seed=3, taps=(-1,))
  weights, spec = teacher.weights(), teacher.spec()
  assert teacher.weights() is weights
  assert jax.tree.map(np.shape, weights) == jax.tree.map(np.shape, spec)
  assert '_loaded' not in pickle.loads(pickle.dumps(teacher)).__dict__


@pytest.mark.parametrize(
  ('change', 'match'),
  [
    (dict(taps=(-1,)), r'as many `objective\.taps`.*found 1 and 2'),
    (dict(taps=(-1, -2)), r'ascending `objective\.taps`'),
    (
      dict(encoder=ENCODER.clone(pooling='mean')),
      r"`objective\.encoder\.pooling` 'none'",
    ),
  ],
)
def test_what_does_not_go_together_is_refused(change, match):
  with pytest.raises(ValueError, match=match):
    dataclasses.replace(OBJECTIVE, **change)
  with pytest.raises(ValueError, match="expected 'patches', found 'class'"):
    ClipTeacher(TOWER.clone(output='class'))


def test_slices_that_do_not_divide(teachers):
  video = jnp.zeros((1, 5, 16, 16, 3))
  with pytest.raises(ValueError, match='that 2 slices divide, found 5'):
    TEACHER.targets(teachers['teacher'], video, (2, 4, 4))
