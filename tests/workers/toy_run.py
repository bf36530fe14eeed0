"""Train a toy model as one of several processes; see test_distributed.py.

  python toy_run.py <port> <processes> <rank> <folder>

One process gets a SIGTERM; all must save and leave at the same step.
"""

import json
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vfm_jax import runtime, sharding
from vfm_jax.checkpoint import Checkpointer
from vfm_jax.sharding import Mesh

TX = optax.adam(1e-2)


def init():
  """Return the state of step 0."""
  keys = jax.random.split(jax.random.key(0))
  params = {
    'fc1': {'kernel': jax.random.normal(keys[0], (16, 32)) / 4},
    'fc2': {'kernel': jax.random.normal(keys[1], (32, 16)) / 8},
  }
  return {
    'params': params,
    'opt_state': TX.init(params),
    'step': jnp.zeros((), jnp.int32),
  }


def batch_of(step, index=0, count=1):
  """Return this process's rows of the batch of a step."""
  x = np.random.default_rng(step).normal(size=(16, 16)).astype(np.float32)
  rows = len(x) // count
  return x[index * rows : (index + 1) * rows]


@jax.jit
def train_step(state, x):
  """Return the state after one step of an autoencoder."""

  def loss(params):
    h = jax.nn.gelu(x @ params['fc1']['kernel'])
    return jnp.mean((h @ params['fc2']['kernel'] - x) ** 2)

  grads = jax.grad(loss)(state['params'])
  updates, opt_state = TX.update(grads, state['opt_state'])
  params = optax.apply_updates(state['params'], updates)
  return {'params': params, 'opt_state': opt_state, 'step': state['step'] + 1}


def main():
  """Run one process and print what it saw as JSON."""
  port, count, rank, folder = sys.argv[1:]
  rank = int(rank)
  assert runtime.initialize(f'localhost:{port}', int(count), rank)
  mesh = sharding.make_mesh(Mesh(data=1, fsdp=-1))
  slots = {
    name: sharding.process_slot(sharding.make_mesh(m))
    for name, m in {
      'fsdp': Mesh(data=1, fsdp=-1),
      'mixed': Mesh(data=-1, tensor=2),
      'tensor': Mesh(data=1, tensor=-1),
    }.items()
  }
  shardings = sharding.infer(jax.eval_shape(init), mesh)
  state = jax.jit(init, out_shardings=shardings)()
  # Only the clock of process 0 says that the time has come.
  minutes = 0.0 if rank == 0 else 1e6
  with (
    Checkpointer(folder, every_steps=None, every_minutes=minutes) as saved,
    runtime.Preemption(agree_every=4) as preemption,
  ):
    for step in range(1, 40):
      index, parts = slots['fsdp']
      x = sharding.put_batch(batch_of(step, index, parts), mesh)
      state = train_step(state, x)
      if step == 6 and rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
      if preemption.requested(step):
        break
    due = saved.should_save(50)
    saved.save(step, state, force=True)
    saved.wait()
    back = saved.restore(jax.eval_shape(init), shardings)
    same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), back, state)
  print(
    json.dumps(
      {
        'stop': step,
        'due': due,
        'slots': slots,
        'same': all(jax.tree.leaves(same)),
      }
    )
  )


if __name__ == '__main__':
  main()
