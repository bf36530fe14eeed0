import jax
import numpy as np

from vfm_jax import trees
from vfm_jax.models.encoders import VideoViT
from vfm_jax.optim import Group, Optimizer
from vfm_jax.schedules import constant

SMALL = dict(width=16, depth=2, heads=2, patch=8, frames=2, image_size=16)


def test_an_adapter_starts_as_nothing_and_then_adds():
  plain, adapted = VideoViT(**SMALL), VideoViT(**SMALL, adapter=4)
  video = jax.random.normal(jax.random.key(0), (2, 2, 16, 16, 3))
  params = jax.device_get(jax.jit(adapted.init)(jax.random.key(1), video))
  params = params['params']
  base = {
    name: {k: v for k, v in value.items() if k != 'adapter'}
    for name, value in params.items()
  }
  own = set(dict(trees.path_leaves(params))) - set(
    dict(trees.path_leaves(base))
  )
  assert own == {
    f'blocks_{i}/adapter/{side}/{leaf}'
    for i in range(2)
    for side in ('down', 'up')
    for leaf in ('kernel', 'bias')
  }
  apply = jax.jit(lambda p, m=adapted: m.apply({'params': p}, video))
  before = apply(params)
  np.testing.assert_array_equal(
    before, jax.jit(plain.apply)({'params': base}, video)
  )
  up = params['blocks_0']['adapter']['up']
  up['kernel'] = np.eye(4, 16, dtype=np.float32)
  assert np.abs(apply(params) - before).max() > 1e-3

  groups = (Group('/adapter/'), Group('.', freeze=True))
  _, rows = Optimizer(constant, groups=groups).build(params, 5)
  assert {r.path for r in rows if not r.frozen} == own
