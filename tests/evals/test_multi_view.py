import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.data import augment, clips
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.data.synthetic import MovingShapes
from vfm_jax.evals.base import Evaluator
from vfm_jax.evals.multi_view import MultiView, average


def test_probabilities_are_averaged_not_logits():
  """One very sure view outvotes two others by logits, not by probability."""
  logits = np.array([[0.0, 9.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
  p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  video = np.array([0, 0, 0, 1])
  found = average(p, video)
  np.testing.assert_allclose(found.sum(1), 1)
  np.testing.assert_allclose(found[0], p[:3].mean(0))
  np.testing.assert_allclose(found[1], p[3])
  two = p[[1, 1, 0]] * [[1, 1], [1, 1], [0, 0]] + [[0, 0], [0, 0], [0.45, 0.55]]
  assert average(two, np.zeros(3, int)).argmax() == 0
  assert logits[:3].sum(0).argmax() == 1


@dataclasses.dataclass(frozen=True)
class Oracle:
  """Know the label, but only on the first crop of a video."""

  def logits(self, params, batch):
    y = jnp.eye(4)[batch['labels']['direction']]
    return params['scale'] * y * (batch['view'] == 0)[:, None]


def test_it_scores_all_views_of_a_video():
  data = Pipeline(
    source=MovingShapes(count=9, frames=8, size=24, directions=4),
    clip=functools.partial(clips.videomae_dense_test, frames=2, clips=2),
    transform=functools.partial(augment.three_crops, size=16),
    views=6,
  )
  evaluator = MultiView(data, 'direction', batch_size=8)
  assert isinstance(evaluator, Evaluator)
  found = evaluator.run(Oracle(), {'scale': jnp.float32(3)}, seed=0)
  assert found == {'direction_views6_top1': 1.0, 'direction_views6_top5': 1.0}
  with pytest.raises(TypeError, match='has no logits'):
    evaluator.run(object(), {}, seed=0)
