"""Describe machines that are not here, well enough to compile for them.

A target is named as in `v5e:16x16` (chips along the axes of the torus) or
`h200:8` (cards of one machine). The compilers come with the extras `tpu` and
`cuda`; neither needs a device or a driver.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

GIB = 2**30


class TopologyError(ValueError):
  """Say that a target is unknown, or what to install to compile for it."""


@dataclasses.dataclass(frozen=True)
class Target:
  """Hold what is known of a machine.

  Attributes:
    name: as it is asked for.
    platform: 'tpu' or 'gpu'.
    kind: name of a device, for a reader.
    devices: their number.
    memory: bytes of one device.
    peak_flops: products of bfloat16, FLOP a second and device, as the vendor
      gives it.
    clock_hz: cycles a second of the compiler's cost model: those at which its
      busiest matrix unit does `peak_flops`. None where it gives no cycles.
    peak_source: where `peak_flops` is from.
  """

  name: str
  platform: str
  kind: str
  devices: int
  memory: int
  peak_flops: float
  clock_hz: float | None
  peak_source: str


@dataclasses.dataclass(frozen=True)
class _Chip:
  """Hold what targets of one kind share.

  Attributes:
    kind: name for a reader.
    names: what devices of the kind call themselves.
    axes: of the torus, 0 for none.
    memory: see `Target`, as all that follow.
    peak_flops: of a device.
    clock_hz: of the cost model.
    source: of the peak.
  """

  kind: str
  names: tuple[str, ...]
  axes: int
  memory: int
  peak_flops: float
  clock_hz: float | None
  source: str


_CLOUD = 'Cloud TPU documentation'
_CHIPS = {
  'v4': _Chip('TPU v4', ('TPU v4',), 3, 32 * GIB, 275e12, 1.05e9, _CLOUD),
  'v5e': _Chip(
    'TPU v5e', ('TPU v5 lite', 'TPU v5e'), 2, 16 * GIB, 197e12, 1.5e9, _CLOUD
  ),
  'v5p': _Chip(
    'TPU v5p', ('TPU v5', 'TPU v5p'), 3, 95 * GIB, 459e12, 1.75e9, _CLOUD
  ),
  'v6e': _Chip(
    'TPU v6e', ('TPU v6 lite', 'TPU v6e'), 2, 32 * GIB, 918e12, 1.75e9, _CLOUD
  ),
  'h200': _Chip(
    'H200',
    ('NVIDIA H200',),
    0,
    143_771 * 2**20,
    989e12,
    None,
    'NVIDIA data sheet, dense',
  ),
}

# What libtpu asks a cloud machine for, answered for one that is none.
_TPU_ENVIRONMENT = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_WORKER_ID': '0',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}

# An H200, in the words of XLA's `stream_executor.GpuTargetConfigProto`.
_H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 }
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 150754820096
  memory_bandwidth: 4800000000000
  l2_cache_size: 62914560
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
"""


def parse(name: str) -> Target:
  """Return the target of a name such as 'v5e:16x16', 'v4:4x4x4' or 'h200:8'.

  Raises:
    TopologyError: there is no such kind, or not in this shape.
  """
  kind, _, shape = name.partition(':')
  chip = _CHIPS.get(kind)
  axes = [int(n) for n in shape.split('x')] if _SHAPE.match(shape) else []
  if chip is None or len(axes) != max(chip.axes, 1) or 0 in axes:
    raise TopologyError(
      '--topology: expected v5e:AxB, v6e:AxB, v4:AxBxC, v5p:AxBxC (chips along '
      f'each axis of the torus) or h200:N, found {name!r}'
    )
  return Target(
    name=name,
    platform='tpu' if chip.axes else 'gpu',
    kind=chip.kind,
    devices=math.prod(axes),
    memory=chip.memory,
    peak_flops=chip.peak_flops,
    clock_hz=chip.clock_hz,
    peak_source=chip.source,
  )


def peak_flops(device_kind: str) -> float:
  """Return the peak of a device in bfloat16, FLOP a second.

  Args:
    device_kind: what the device calls itself, as in 'TPU v5 lite'.

  Raises:
    TopologyError: it is not known.
  """
  for chip in _CHIPS.values():
    if device_kind in chip.names:
      return chip.peak_flops
  known = sorted(name for chip in _CHIPS.values() for name in chip.names)
  raise TopologyError(
    f'the peak of {device_kind!r} is not known; expected one of {known}'
  )


_SHAPE = re.compile(r'\d+(x\d+)*$')


def devices(target: Target) -> list[Any]:
  """Return devices to compile for; they can hold no array.

  Raises:
    TopologyError: the compiler is not installed, or knows no such shape.
  """
  extra, modules = _COMPILERS[target.platform]
  if not any(importlib.util.find_spec(m) for m in modules):
    raise TopologyError(
      f'--topology={target.name} needs the compiler of the extra {extra!r}, '
      f"which is not installed; install it with: pip install 'vfm_jax[{extra}]'"
      ' (no device and no driver are needed)'
    )
  kind, _, shape = target.name.partition(':')
  try:
    if target.platform == 'gpu':
      found = topologies.get_topology_desc(
        platform='cuda', target_config=_H200, topology=f'1x1x{shape}'
      )
    else:
      for key, value in _TPU_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
      # A v4 chip is one device, of two cores that work together.
      options = {'chip_config_name': 'megacore'} if kind == 'v4' else {}
      found = topologies.get_topology_desc(
        platform='tpu', topology_name=target.name, **options
      )
  except (RuntimeError, NotImplementedError) as e:
    raise TopologyError(
      f'--topology={target.name}: the compiler refuses it: {e}'
    ) from e
  if len(found.devices) != target.devices:
    raise TopologyError(
      f'--topology={target.name}: expected {target.devices} devices, the '
      f'compiler has {len(found.devices)}'
    )
  return found.devices


_COMPILERS = {
  'tpu': ('tpu', ('libtpu',)),
  'gpu': ('cuda', ('jax_cuda13_plugin', 'jax_cuda12_plugin')),
}


def stay_on_cpu() -> None:
  """Keep JAX from starting the accelerators that a compiler came with.

  Call it before anything touches a device.
  """
  jax.config.update('jax_platforms', 'cpu')
