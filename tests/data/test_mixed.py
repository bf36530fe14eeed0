import functools

import numpy as np
import pytest

from vfm_jax.data import augment, clips
from vfm_jax.data.mixed import Mixed
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.data.synthetic import MovingShapes


def pipeline(frames, count):
  return Pipeline(
    source=MovingShapes(count=count, frames=8, size=16),
    clip=functools.partial(clips.uniform, frames=frames),
    transform=functools.partial(augment.center_crop, size=16),
  )


MIXED = Mixed((pipeline(4, 12), pipeline(1, 8)), turns=(2, 1))


def take(count, **how):
  with MIXED.train_batches(4, seed=0, **how) as batches:
    out = [next(batches) for _ in range(count)]
    assert batches.stats.seen == 4 * count
  return out


def test_videos_and_images_take_turns_and_resume():
  assert MIXED.rotation() == [0, 1, 0]
  assert Mixed((pipeline(4, 12),) * 2, turns=(5, 2)).rotation() == [
    0, 1, 0, 0, 0, 1, 0,
  ]  # fmt: skip
  batches = take(7)
  frames = [b['video'].shape[1] for b in batches]
  assert frames == [4, 1, 4, 4, 1, 4, 4]
  for start in (1, 4):
    for a, b in zip(take(2, start_step=start), batches[start:], strict=False):
      np.testing.assert_array_equal(a['video'], b['video'])
      np.testing.assert_array_equal(a['index'], b['index'])
  # An epoch of the first: every video once.
  seen = [i for b in batches if b['video'].shape[1] == 4 for i in b['index']]
  assert sorted(seen[:12]) == list(range(12))


def test_the_rest_is_of_the_first_pipeline():
  assert MIXED.num_examples == 20
  assert MIXED.element_spec(4)['video'].shape == (4, 4, 16, 16, 3)
  with MIXED.eval_batches(4) as batches:
    assert next(batches)['video'].shape[1] == 4
  with pytest.raises(ValueError, match=r'turns: expected .* of the 1 data'):
    Mixed((pipeline(4, 12),))
