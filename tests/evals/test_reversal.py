"""Check the test of direction with encoders whose answer is known."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.data import clips, sources, video
from vfm_jax.data.augment import identity
from vfm_jax.data.chosen import WithLabel
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.evals.base import Evaluator
from vfm_jax.evals.outcome import Detailed
from vfm_jax.evals.reversal import ReversalTest, separate

FRAMES = 6


@dataclasses.dataclass(frozen=True)
class Rising:
  """A square that moves up (class 0) or anywhere (class 1)."""

  count: int = 40

  @property
  def label_names(self):
    return ('action',)

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    sources.check_index(index, self.count)
    labels = {'action': index % 2}
    return video.Video(f'v{index}', labels, functools.partial(_open, index))


def _open(index):
  rng = np.random.default_rng(index)
  frames = rng.integers(0, 99, (FRAMES, 16, 16, 3), np.uint8)
  x = rng.integers(0, 12)
  rows = np.arange(12, 0, -2) if index % 2 == 0 else rng.integers(0, 12, FRAMES)
  for t, y in enumerate(rows):
    frames[t, y : y + 4, x : x + 4] = 255
  return video.ArrayReader(frames, 25.0)


class Bag:
  """Ignore order: the mean of what each frame gives."""

  def frames(self, batch):
    x = batch['video'].astype(jnp.float32) / 255
    return x.mean((3, 4)).reshape(*x.shape[:2], -1)  # brightness of each row

  def embed(self, params, batch):
    del params
    return self.frames(batch).mean(1)


class Ordered(Bag):
  """See order: the mean of the last half minus that of the first."""

  def embed(self, params, batch):
    x = self.frames(batch)
    return x[:, FRAMES // 2 :].mean(1) - x[:, : FRAMES // 2].mean(1)


def reversal(**kwargs):
  data = Pipeline(
    source=Rising(),
    clip=functools.partial(clips.uniform, frames=FRAMES),
    transform=identity,
  )
  fields = dict(
    data=data, label='action', classes=(0,), name='toy', batch_size=8
  )
  return ReversalTest(**{**fields, **kwargs})


ACCURACY = 'toy_action0_reversal_lda5fold_accuracy'
FISHER = 'toy_action0_reversal_lda5fold_fisher'


def test_an_encoder_that_ignores_order_scores_exactly_chance():
  test = reversal()
  assert isinstance(test, Evaluator)
  assert isinstance(test, Detailed)
  for seed in range(3):
    got = test.run(Bag(), {}, seed=seed)
    assert got == {ACCURACY: 0.5, FISHER: 0.0}


def test_an_encoder_that_sees_order_scores_all():
  out = reversal().evaluate(Ordered(), {}, seed=0)
  assert out.scalars[ACCURACY] == 1.0
  assert out.scalars[FISHER] > 10
  found = out.maps[0]
  assert found.classes == ['forward', 'reversed']
  assert found.ids[0] == '0'
  assert found.ids[-1] == '19, reversed'
  x = np.array(found.points)[:, 0]
  assert x[:20].min() > 0 > x[20:].max()


def test_motion_without_a_direction_does_not_part():
  got = reversal(classes=(1,)).run(Ordered(), {}, seed=0)
  assert 0.2 < got['toy_action1_reversal_lda5fold_accuracy'] < 0.8


def test_clips_of_a_video_share_a_fold_and_noise_of_summing_is_no_difference():
  rng = np.random.default_rng(0)
  f = rng.normal(size=(20, 3))
  noise = 1e-6 * rng.normal(size=f.shape)
  assert separate(f, f + noise, np.arange(20)).accuracy == 0.5
  # The sign is told by the video: it can't be learned from other videos.
  video_of = np.repeat(np.arange(10), 2)
  apart = 5 * np.eye(10)[video_of] * rng.choice([-1, 1], 10)[video_of, None]
  result = separate(apart, -apart, video_of)
  assert result.accuracy <= 0.5
  assert result.axis.shape == (40,)


def test_examples_of_a_class_are_found_without_decoding():
  some = WithLabel(Rising(6), 'action', (1,))
  assert [some[i].id for i in range(len(some))] == ['v1', 'v3', 'v5']
  assert some.label_names == ('action',)
  with pytest.raises(IndexError):
    some[3]
  with pytest.raises(ValueError, match=r"no label 'mood'.*action"):
    WithLabel(Rising(), 'mood', (1,))


def test_errors_say_what_to_change():
  with pytest.raises(ValueError, match='go together'):
    reversal(classes=())
  with pytest.raises(ValueError, match=r'reversal.folds'):
    reversal(folds=1)
  with pytest.raises(ValueError, match=r'0 clips of class 7'):
    reversal(classes=(7,)).run(Bag(), {}, seed=0)
  with pytest.raises(TypeError, match='no embed'):
    reversal().run(object(), {}, seed=0)
  with pytest.raises(ValueError, match='5 folds'):
    separate(np.eye(3), np.eye(3), np.arange(3))
  with pytest.raises(ValueError, match='one length'):
    separate(np.eye(3), np.eye(2), np.arange(3))
