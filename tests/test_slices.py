"""Check which devices an axis of the mesh joins."""

import dataclasses

import jax
import numpy as np
import pytest

from vfm_jax import config, presets, sharding, slices
from vfm_jax.sharding import Mesh


@dataclasses.dataclass(frozen=True)
class Device:
  """Stand in for a chip of a 2 x 2 slice, with one core."""

  id: int
  slice_index: int
  platform: str = 'tpu'
  device_kind: str = 'TPU v5 lite'
  core_on_chip: int = 0

  @property
  def coords(self):
    return (self.id % 2, self.id // 2 % 2, 0)

  @property
  def process_index(self):
    return self.id // 4


def pod(count, platform='tpu'):
  return [
    Device(i, i // 4, platform, 'TPU v5 lite' if platform == 'tpu' else 'GPU')
    for i in range(4 * count)
  ]


def slices_along(array, axis):
  """Return how many slices the groups of an axis join."""
  moved = np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])
  return {len({d.slice_index for d in group}) for group in moved}


@pytest.mark.parametrize(
  'mesh', [Mesh(), Mesh(fsdp=4), Mesh(fsdp=2, tensor=2), Mesh(seq=2)]
)
def test_only_data_goes_between_slices(mesh):
  sizes = mesh.sizes(12)
  array = slices.arrange(sizes, pod(3))
  assert array.shape == tuple(sizes.values())
  assert len(set(array.flat)) == 12
  assert slices_along(array, 0) == {3}
  assert all(slices_along(array, axis) == {1} for axis in range(1, 5))


def test_state_that_is_cut_over_slices_is_refused():
  with pytest.raises(
    ValueError, match=r'over 2 slices: expected config\.mesh\.data to be a mul'
  ):
    slices.arrange(Mesh(data=1, fsdp=8).sizes(8), pod(2))


def test_machines_with_gpus_are_in_their_order():
  mixed = sorted(pod(2, 'gpu'), key=lambda d: d.id % 4)
  array = slices.arrange(Mesh(data=1, fsdp=2, tensor=4).sizes(8), mixed)
  assert slices_along(array, 2) == {1}


def test_devices_that_know_no_slices():
  assert slices.slice_of(jax.devices()[0]) == 0
  array = slices.arrange(Mesh(tensor=2).sizes(8), jax.devices())
  assert list(array.flat) == jax.devices()


@pytest.mark.parametrize(
  ('mesh', 'sizes'),
  [
    (presets.dp(), (8, 1, 1, 1, 1)),
    (presets.fsdp(), (1, 8, 1, 1, 1)),
    (presets.fsdp(4), (2, 4, 1, 1, 1)),
    (presets.fsdp(replicas=4), (4, 2, 1, 1, 1)),
    (presets.fsdp_tensor(4), (1, 2, 4, 1, 1)),
    (presets.sequence(2, ways=2), (2, 2, 1, 2, 1)),
    (presets.experts(4), (1, 2, 1, 1, 4)),
  ],
)
def test_presets(mesh, sizes):
  assert tuple(mesh.sizes(8).values()) == sizes


@pytest.mark.parametrize(
  ('preset', 'axis'),
  [
    (presets.fsdp_tensor, 'tensor'),
    (presets.sequence, 'seq'),
    (presets.experts, 'expert'),
  ],
)
def test_a_preset_needs_its_axis(preset, axis):
  with pytest.raises(
    sharding.ShardingError, match=rf'mesh\.{axis}: expected at least 2 dev'
  ):
    preset(1)


def test_presets_and_spread_rules_are_values_of_a_config():
  node = config.ref(presets.sequence, seq=4)
  assert config.build(node) == Mesh(data=1, fsdp=-1, seq=4)
  assert config.build(config.ref(sharding.spread)) == sharding.spread()
