"""Arrange devices so that axes which talk much lie on fast links."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils


def arrange(sizes: Mapping[str, int], devices: Sequence[Any]) -> np.ndarray:
  """Return the devices as an array [*sizes].

  TPU slices are linked by the network between machines, a tenth and less as
  fast as the links inside: only the first axis goes over them, whose devices
  exchange gradients once a step. Other accelerators that say of which slice
  they are (a GPU: its machine) are put in the order of slices.

  Args:
    sizes: {axis: size}; later axes talk more.
    devices: as many as the sizes multiply to.

  Raises:
    ValueError: the first axis is no multiple of the number of TPU slices.
  """
  shape = tuple(sizes.values())
  slices = {slice_of(d) for d in devices}
  if devices[0].platform != 'tpu':
    ordered = sorted(devices, key=slice_of) if len(slices) > 1 else devices
    return np.asarray(ordered, dtype=object).reshape(shape)
  if len(slices) == 1:
    return mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
  first = next(iter(sizes))
  if sizes[first] % len(slices):
    raise ValueError(
      f'config.mesh={dict(sizes)} over {len(slices)} slices: expected '
      f'config.mesh.{first} to be a multiple of {len(slices)}, for it alone '
      f'goes between slices, found {sizes[first]}'
    )
  return mesh_utils.create_hybrid_device_mesh(
    (shape[0] // len(slices), *shape[1:]),
    (len(slices), *(1 for _ in shape[1:])),
    devices,
    allow_split_physical_axes=True,
  )


def slice_of(device: Any) -> int:
  """Return the number of the slice that a device is of."""
  found = getattr(device, 'slice_index', None)
  return 0 if found is None else int(found)
