import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax import sharding
from vfm_jax.models import efficientnet
from vfm_jax.objectives.convnet_teacher import EfficientNetTeacher
from vfm_jax.objectives.teachers import Teacher


def test_cells_see_their_own_place_and_time():
  teacher = EfficientNetTeacher(tap=4)
  weights, grid = teacher.weights(), (2, 2, 2)
  video = np.full((1, 4, 16, 16, 3), 0.5, np.float32)
  changed = video.copy()
  changed[:, 2:, :8, :8] = np.random.default_rng(0).random((1, 2, 8, 8, 3))
  targets = jax.jit(lambda x: teacher.targets(weights, x, grid).features)
  one, other = targets(video), targets(changed)
  assert isinstance(teacher, Teacher)
  assert one.shape == (1, 1, 8, teacher.features)
  np.testing.assert_allclose(jnp.linalg.norm(one, axis=-1), 1, atol=1e-5)
  moved = np.abs(np.asarray(one - other)).sum(-1)[0, 0].reshape(2, 2, 2)
  assert not moved[0].any()
  assert moved[1].argmax() == 0
  first = dataclasses.replace(teacher, slices='first')
  by_first = jax.jit(lambda x: first.targets(weights, x, grid).features)
  np.testing.assert_allclose(by_first(video), one, atol=1e-5)
  spec = jax.tree.map(lambda x: (x.shape, x.dtype), teacher.spec())
  assert spec == jax.tree.map(lambda x: (x.shape, x.dtype), weights)


def test_every_weight_has_a_sharding():
  spec = {'teacher': EfficientNetTeacher().spec()}
  shardings = sharding.infer(spec, {'data': 2, 'fsdp': 4})
  assert len(jax.tree.leaves(shardings)) == len(jax.tree.leaves(spec))


def test_errors(tmp_path):
  with pytest.raises(ValueError, match='block from 0 to 15 as `tap`, found 16'):
    EfficientNetTeacher(tap=16)
  teacher = EfficientNetTeacher()
  with pytest.raises(ValueError, match='that 3 slices divide, found 4'):
    teacher.targets({}, jnp.zeros((1, 4, 16, 16, 3)), (3, 2, 2))
  with pytest.raises(FileNotFoundError, match=r'`objective\.teacher\.path`'):
    EfficientNetTeacher(path=str(tmp_path / 'none.pth')).weights()


def test_shapes_of_blocks():
  x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  for tap in (0, 2, 10, 15):
    module = efficientnet.EfficientNetLite0(tap=tap)
    out = jax.eval_shape(
      lambda key, x, m=module: m.init_with_output(key, x)[0],
      jax.random.key(0),
      x,
    )
    stride, channels = efficientnet.shape_of(tap)
    assert out.shape == (1, 64 // stride, 64 // stride, channels)
