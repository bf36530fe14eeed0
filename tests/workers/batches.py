"""Print what one of several processes sees of a run; see test_distributed.py.

python batches.py <recipe> <folder> <host:port> <processes> <rank>
"""

import hashlib
import json
import sys

import jax
import numpy as np

from vfm_jax import config, runtime, sharding
from vfm_jax.checkpoint import Checkpointer
from vfm_jax.evals.base import to_host
from vfm_jax.sharding import Mesh

STEPS = 3


def digests(exp, mesh, workers):
  """Return one digest a row of the global batch, for the first steps."""
  index, count = sharding.process_slot(mesh)
  out = []
  with exp.data.train.train_batches(
    exp.batch_size,
    seed=exp.seed,
    process_index=index,
    process_count=count,
    workers=workers,
  ) as batches:
    for _ in range(STEPS):
      whole = jax.tree.map(to_host, sharding.put_batch(next(batches), mesh))
      np.testing.assert_array_equal(whole['row'], np.arange(exp.batch_size))
      for row in range(exp.batch_size):
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(whole):
          digest.update(leaf[row].tobytes())
        out.append(digest.hexdigest())
  return out


def main():
  recipe, folder, coordinator, count, rank = sys.argv[1:]
  rank = int(rank)
  assert runtime.initialize(coordinator, int(count), rank)
  exp = config.build(config.load(recipe))
  mesh = sharding.make_mesh(exp.mesh)
  meshes = {
    'fsdp': Mesh(data=1, fsdp=-1),
    'mixed': Mesh(data=-1, tensor=2),
    'tensor': Mesh(data=1, tensor=-1),
  }
  # Only the clock of process 0 says that the time to save has come.
  minutes = 0.0 if rank == 0 else 1e6
  with Checkpointer(folder, every_steps=None, every_minutes=minutes) as saved:
    due = saved.should_save(50)
  print(
    json.dumps(
      {
        'slots': {
          name: sharding.process_slot(sharding.make_mesh(m))
          for name, m in meshes.items()
        },
        'due': due,
        'digests': {str(w): digests(exp, mesh, w) for w in (0, 1)},
      }
    )
  )


if __name__ == '__main__':
  main()
