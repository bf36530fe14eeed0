"""Check that a classifier of real digits knows what samples show."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.data import augment, clips
from vfm_jax.data.digits import Digits
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.evals import agreement

FEW = Pipeline(
  source=Digits(split='train', val_per_class=480, pad=0),
  clip=functools.partial(clips.uniform, frames=1),
  transform=augment.identity,
)
EVALUATOR = agreement.Agreement(
  train=FEW, val=FEW, count=40, epochs=8, batch_size=20
)


def digits():
  """Return the real digits uint8 [10, 20, 28, 28], by class."""
  with FEW.eval_batches(20) as batches:
    images = np.concatenate([b['video'] for b in batches])[:, 0, :, :, 0]
  return images.reshape(20, 10, 28, 28).swapaxes(0, 1)


@dataclasses.dataclass(frozen=True)
class Copies:
  """Draw real digits, of the class that is `shift` after the one asked for."""

  shift: int
  label: str | None = 'label'
  data: str = 'video'

  def check_labels(self, labels):
    del labels
    return None if self.label is None else list(range(10))

  def draw(self, params, keys, shape, y=None):
    raise NotImplementedError

  def sample(self, params, keys, shape, y=None):
    assert shape == (1, 28, 28, 1)
    pick = jax.vmap(lambda key: jax.random.randint(key, (), 0, 20))(keys)
    images = params['digits'][(y + self.shift) % 10, pick]
    return jnp.broadcast_to(images[:, None, ..., None], (len(y), 1, 28, 28, 3))


@pytest.mark.slow
def test_it_agrees_with_the_class_that_is_shown_and_with_no_other():
  params = {'digits': jnp.asarray(digits())}
  right = EVALUATOR.run(Copies(0), params, seed=0)
  assert sorted(right) == ['agreement_n40', 'classifier_top1']
  assert right['agreement_n40'] > 0.8
  assert right['classifier_top1'] > 0.8
  wrong = EVALUATOR.run(Copies(1), params, seed=0)
  assert wrong['agreement_n40'] < 0.2
  assert wrong['classifier_top1'] == right['classifier_top1']


def test_augmentation_moves_a_digit_a_little():
  image = jnp.asarray(digits()[3, 0, ..., None], jnp.float32) / 255
  keys = jax.random.split(jax.random.key(0), 8)
  out = np.asarray(jax.vmap(agreement.augment, (None, 0))(image, keys))
  assert out.shape == (8, 28, 28, 1)
  change = np.abs(out - image).mean((1, 2, 3))
  assert change.min() > 0.005
  assert np.abs(out.sum((1, 2, 3)) / image.sum() - 1).max() < 0.4


def test_errors():
  with pytest.raises(ValueError, match=r'`objective\.label` to name a label'):
    EVALUATOR.run(Copies(0, label=None), {}, seed=0)
  other = dataclasses.replace(EVALUATOR, label='shape')
  with pytest.raises(ValueError, match=r"label 'shape', found \['label'\]"):
    other.run(Copies(0), {}, seed=0)
  large = dataclasses.replace(EVALUATOR, batch_size=500)
  with pytest.raises(ValueError, match=r'at least 500 images .* found 200'):
    large.run(Copies(0), {}, seed=0)
