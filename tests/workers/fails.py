"""Fail in the last of several processes, while the others wait for it.

python fails.py <host:port> <processes> <rank>
"""

import sys

from jax.experimental import multihost_utils

from vfm_jax import runtime


def main():
  coordinator, count, rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
  runtime.initialize(coordinator, count, rank)
  with runtime.shared_fate():
    multihost_utils.sync_global_devices('start')
    if rank == count - 1:
      raise ValueError('no such video')
    multihost_utils.sync_global_devices('end')


if __name__ == '__main__':
  main()
