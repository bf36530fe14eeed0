import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.models.clip import ClipViT
from vfm_jax.models.encoders import VideoViT
from vfm_jax.models.vjepa import LatentPredictor
from vfm_jax.objectives import base, frozen
from vfm_jax.objectives.distill import Distill
from vfm_jax.objectives.latent import LatentPrediction
from vfm_jax.objectives.teachers import ClipTeacher
from vfm_jax.objectives.twlv import Twlv
from vfm_jax.ops import blocks, guided, masking

TOWER = ClipViT(width=16, depth=1, heads=2, patch=4, features=12, image_size=8)
SHARED = dict(
  encoder=VideoViT(
    width=16, depth=1, heads=2, patch=4, frames=4, image_size=16, drop_path=0.1
  )
)
LEARNED = dict(teacher=ClipTeacher(TOWER, seed=3, taps=(-1,)), taps=(-1,))
PREDICTED = dict(predictor=LatentPredictor(width=16, depth=1, heads=2))
MASKS = (
  functools.partial(masking.tube, ratio=0.75),
  blocks.MultiBlock(num_blocks=1, context=0.25, targets=0.5),
)
OBJECTIVE = Twlv(**SHARED, **LEARNED, **PREDICTED, masks=MASKS[:1])
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
def state():
  params, extra = jax.eval_shape(OBJECTIVE.init, jax.random.key(0), BATCH)
  assert set(params) == {'encoder', 'heads', 'predictor'}
  assert set(extra) == {'target'}
  return fill(params), fill(OBJECTIVE.teacher_spec()), fill(extra)


def gradients(objective, state, batch=BATCH):
  params, teachers, extra = state

  @jax.jit
  def run(given, extra):
    def loss(given, extra):
      out = objective.loss(given, extra, batch, jax.random.key(1), train=True)
      return (out.sums / out.counts).sum(), out

    # Of everything, what is frozen and what is a copy too.
    return jax.value_and_grad(loss, (0, 1), has_aux=True)(given, extra)

  (_, out), (grads, of_extra) = run({**params, **teachers}, extra)
  return out, grads, of_extra


def same(got, want, names):
  np.testing.assert_array_equal(got[0].sums, want[0].sums)
  np.testing.assert_array_equal(got[0].counts, want[0].counts)
  for name in names:
    jax.tree.map(np.testing.assert_array_equal, got[1][name], want[1][name])


def zero(tree):
  return not any(np.any(x) for x in jax.tree.leaves(tree))


def test_protocols():
  assert isinstance(OBJECTIVE, base.Objective)
  assert isinstance(OBJECTIVE, base.EmbedsTokens)
  assert isinstance(OBJECTIVE, frozen.Taught)


def test_without_latents_it_is_distillation_bit_for_bit(state):
  mask = guided.AttentionGuided(0.75)
  half = dataclasses.replace(OBJECTIVE, latent_weight=0.0, masks=(mask,))
  umt = Distill(**SHARED, **LEARNED, mask=mask)
  got = gradients(half, state)
  same(got, gradients(umt, state), ('encoder', 'heads'))
  assert zero(got[1]['predictor'])
  assert zero(got[1]['teacher'])


@pytest.mark.parametrize('count', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_without_a_teacher_it_is_latent_prediction_bit_for_bit(state, count):
  half = dataclasses.replace(OBJECTIVE, distill_weight=0.0, masks=MASKS[:count])
  # Masks of `ops.masking` are told what is predicted: all that is hidden.
  masks = (functools.partial(blocks.complement, mask=MASKS[0]), *MASKS[1:])
  masks = masks[:count]
  jepa = LatentPrediction(**SHARED, **PREDICTED, masks=masks, rescale=False)
  assert half.teachers() == half.teacher_spec() == {}
  got = gradients(half, (state[0], {}, state[2]))
  want = gradients(jepa, (state[0], {}, state[2]))
  same(got, want, ('encoder', 'predictor'))
  assert zero(got[1]['heads'])
  assert zero(got[2])


@pytest.mark.slow
def test_both_terms_are_weighed_and_reach_no_teacher(state):
  out, grads, of_extra = gradients(
    dataclasses.replace(OBJECTIVE, latent_weight=0.5), state
  )
  # Two slices of 4 visible cells; two examples.
  np.testing.assert_array_equal(out.counts, [2 * 2 * 4, 2])
  np.testing.assert_allclose(
    out.sums / out.counts,
    [out.metrics['distill_l2'], 0.5 * out.metrics['latent_error']],
    rtol=1e-6,
  )
  assert zero(grads['teacher'])
  assert zero(of_extra)
  for name in ('encoder', 'heads', 'predictor'):
    assert not zero(grads[name])


@pytest.mark.slow
def test_images_have_masks_of_their_own(state):
  half = functools.partial(masking.tube, ratio=0.5)
  objective = dataclasses.replace(OBJECTIVE, image_masks=(half,))
  params, teachers, extra = state
  image = {**BATCH, 'video': BATCH['video'][:, :1]}
  out = jax.jit(
    lambda given: objective.loss(
      given, extra, image, jax.random.key(1), train=True
    )
  )({**params, **teachers})
  # One slice of 16 cells.
  np.testing.assert_array_equal(out.counts, [2 * 8, 2])
  assert np.isfinite(out.sums).all()


def test_the_copy_follows_and_may_be_evaluated(state):
  params, _, extra = state
  objective = dataclasses.replace(OBJECTIVE, momentum=0.75, evaluate='copy')
  new = objective.after_update(extra, params, jnp.zeros(()), {})
  bias = lambda tree: np.asarray(tree['norm']['bias'])  # noqa: E731
  want = 0.75 * bias(extra['target']) + 0.25 * bias(params['encoder'])
  np.testing.assert_allclose(bias(new['target']), want, rtol=1e-6)
  assert objective.evaluated(params, new)['encoder'] is new['target']
  assert OBJECTIVE.evaluated(params, new) is params
  again = objective.restart(extra, params)['target']
  jax.tree.map(np.testing.assert_array_equal, again, params['encoder'])
  shape = jax.eval_shape(OBJECTIVE.tokens, params, BATCH).shape
  assert shape == (2, 32, 16)
  assert jax.eval_shape(OBJECTIVE.embed, params, BATCH).shape == (2, 16)


def test_hidden_pixels_never_reach_the_student(state):
  params = state[0]
  video = OBJECTIVE.distill.pixels_of(BATCH)
  split = blocks.Split(jnp.array([[0, 5, 17]] * 2), jnp.array([[3, 9]] * 2))

  @jax.jit
  def run(clips):
    encoded, tapped = OBJECTIVE.distill.encode(params, clips, split.visible_idx)
    return (
      OBJECTIVE.distill.predict(params, clips, tapped, split.visible_idx),
      OBJECTIVE.latent.predict(params, clips, encoded, split),
    )

  jax.tree.map(
    np.testing.assert_array_equal,
    run(video),
    # Token 3: slice 0, row 0, column 3.
    run(video.at[:, :2, :4, 12:].set(0.5)),
  )


@pytest.mark.parametrize(
  ('change', 'match'),
  [
    (dict(distill_weight=0.0, latent_weight=0.0), 'one of them positive'),
    (dict(latent_weight=-1.0), 'at least 0'),
    (dict(masks=()), 'at least one'),
    (dict(masks=MASKS * 2), r'`objective\.predictor\.mask_tokens`, found 2'),
    (dict(taps=(0, 1)), r'as many `objective\.taps`'),
  ],
)
def test_what_leaves_nothing_to_learn_is_refused(change, match):
  with pytest.raises(ValueError, match=match):
    dataclasses.replace(OBJECTIVE, **change)
