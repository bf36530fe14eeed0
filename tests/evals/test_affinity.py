import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vfm_jax import config
from vfm_jax.data import augment, clips
from vfm_jax.data.digits import Digits
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.evals import base
from vfm_jax.evals.affinity import TaskAffinity, gradient_affinity
from vfm_jax.objectives.denoise import Denoise
from vfm_jax.ops.clustering import by_affinity
from vfm_jax.ops.diffusion import Gaussian

DATA = Pipeline(
  Digits(split='val', val_per_class=4),
  functools.partial(clips.uniform, frames=1),
  augment.identity,
  path='data.val',
)


class TwoHalves(nn.Module):
  """Scale each pixel, by one table for clean levels and one for noisy ones."""

  label_dropout: float = 0.0
  channels: int = 1
  num_classes: int = 10

  @nn.compact
  def __call__(self, x, t, y=None, *, drop=None, tau=None, keys=None):
    shape = (2, *x.shape[1:])
    table = self.param('table', nn.initializers.zeros, shape)
    return table[tau // 500] * x


OBJECTIVE = Denoise(
  TwoHalves(), Gaussian(variance='small'), data='video', label=None
)


@pytest.fixture(scope='module')
def batches():
  with DATA.eval_batches(20) as found:
    return list(found)


@pytest.fixture(scope='module')
def params(batches):
  return jax.jit(OBJECTIVE.init)(jax.random.key(0), batches[0])[0]


def test_halves_that_share_nothing_are_orthogonal(params, batches):
  at = [300, 350, 600, 650]
  full = gradient_affinity(OBJECTIVE, params, batches, at, sketch=None)
  np.testing.assert_allclose(np.diagonal(full), 1, rtol=1e-6)
  np.testing.assert_array_equal(full, full.T)
  np.testing.assert_allclose(full[:2, 2:], 0, atol=1e-6)
  assert full[0, 1] > 0.5
  assert full[2, 3] > 0.5
  sketched = gradient_affinity(OBJECTIVE, params, batches, at, sketch=1024)
  np.testing.assert_allclose(sketched, full, atol=0.15)
  again = gradient_affinity(OBJECTIVE, params, batches, at, sketch=1024)
  np.testing.assert_array_equal(sketched, again)


def test_evaluates_and_draws(params, tmp_path):
  evaluator = TaskAffinity(
    DATA, levels=6, count=30, batch_size=20, folder=str(tmp_path / 'new')
  )
  assert isinstance(evaluator, base.Evaluator)
  got = evaluator.run(OBJECTIVE, params, seed=0)
  assert set(got) == {f'affinity_6x30_{w}' for w in ('near', 'all', 'least')}
  assert got['affinity_6x30_least'] < 0.1 < got['affinity_6x30_near']
  with np.load(tmp_path / 'new' / 'affinity.npz') as file:
    assert file['levels'].tolist() == [0, 200, 400, 599, 799, 999]
    assert file['affinity'].shape == (6, 6)
  found = by_affinity(str(tmp_path / 'new' / 'affinity.npz'), 2)
  assert found.bounds == (0, 500, 1000)
  with Image.open(tmp_path / 'new' / 'affinity.png') as picture:
    assert min(picture.size) > 300


def test_recipes_and_refusals(params, batches):
  node = config.ref(
    TaskAffinity,
    data=config.ref(
      Pipeline,
      source=config.ref(Digits, split='val'),
      clip=config.bind(clips.uniform, frames=1),
      transform=augment.identity,
    ),
  )
  assert config.build(node).levels == 20
  with pytest.raises(ValueError, match='`levels` from 2 to 1000, found 1'):
    TaskAffinity(DATA, levels=1)
  with pytest.raises(ValueError, match='`sketch` of 1 or more'):
    TaskAffinity(DATA, sketch=0)
  with pytest.raises(TypeError, match=r'TaskAffinity needs config.objective'):
    TaskAffinity(DATA).run(object(), params, seed=0)
  few = Denoise(TwoHalves(), Gaussian(steps=30, variance='small'), data='video')
  with pytest.raises(ValueError, match=r'none in the noise levels \[\(5, 6\)'):
    gradient_affinity(few, params, batches, [0, 5])
  with pytest.raises(ValueError, match='no batches'):
    gradient_affinity(OBJECTIVE, params, [], [0, 5])
  bad = jax.tree.map(lambda p: p * jnp.nan, params)
  with pytest.raises(ValueError, match=r'noise levels \[300\]'):
    gradient_affinity(OBJECTIVE, bad, batches[:1], [300], sketch=None)
