"""Time steps of denoisers trained as multi-task learners against plain ones.

The first 4 blocks of DiT-S/2, latents 32 x 32 x 4, batch 4, 1,000 classes,
float32: noise, forward, backward and AdamW. As a program
(`python -m benchmarks.multitask_step NAME`) this is one contestant.
"""

import dataclasses
import sys
from typing import Any

from benchmarks import contestants, dit_step, interleave, results

DEPTH, TASKS = 4, 4
WORK = dict(batch=dit_step.BATCH, tasks=TASKS, depth=DEPTH)
TITLE = f'DiT-S/2 of {DEPTH} blocks, step, batch {dit_step.BATCH}'
MACHINE = f'{contestants.CORES} CPU cores, malloc as launch/setup.sh sets it.'
METHODS = (
  f'{TASKS} intervals of the noise levels as tasks, one example each, for all '
  'contestants. Switch-DiT has 3 experts, of which a level uses 2, and the '
  'prior.'
)
PLAIN = 'DiT, all parameters'
BARS = {
  'Switch-DiT, dispatched': 1.35,
  'DMP': 1.0,
  'PCGrad': TASKS + 1.0,
  'NashMTL, between bargains': 1.3,
}
NAMES = (PLAIN, *BARS, 'NashMTL, a bargain')


def contestant(name: str) -> interleave.Contestant:
  """Return the process that steps one of the methods."""
  command = ('-m', 'benchmarks.multitask_step', name)
  return interleave.Contestant(name, command, contestants.KEEP_MEMORY)


def run(rounds: int) -> results.Comparison:
  """Compare the train steps."""
  seconds, info = interleave.compare(
    [contestant(name) for name in NAMES],
    rounds=rounds,
    repeats=6,
  )
  return results.Comparison(
    title=TITLE,
    reference=PLAIN,
    seconds=seconds,
    bars=BARS,
    notes=(
      f'{METHODS} DMP adds a prompt to each of 256 tokens of a frozen network, '
      f'with balancing losses. NashMTL bargains every 25 steps. {MACHINE}'
    ),
    info=info,
  )


def serve(name: str) -> None:
  """Be a contestant."""
  from vfm_jax import multitask
  from vfm_jax.models import prompts, switch
  from vfm_jax.models.routing import Routing
  from vfm_jax.nn.adaln import Hooks
  from vfm_jax.objectives.balance import Balance
  from vfm_jax.objectives.denoise import Denoise
  from vfm_jax.objectives.prior import DiffusionPrior
  from vfm_jax.ops.intervals import uniform
  from vfm_jax.ops.strata import Stratified
  from vfm_jax.optim import Group

  tokens = (dit_step.SIZE // dit_step.PATCH) ** 2
  method, _, way = name.partition(', ')
  hooks, auxiliary, groups, combine = Hooks(), None, (), None
  if method == 'DTR':
    hooks = Hooks(mask=Routing())
  elif method == 'Switch-DiT':
    impl: Any = {'merged': 'merged', 'dispatched': 'grouped'}[way]
    hooks, auxiliary = switch.switch(impl=impl), DiffusionPrior()
  elif method == 'DMP':
    hooks, auxiliary = prompts.dmp(tokens), Balance()
    groups = (Group('token_hook|prepare_hook'), Group('.', freeze=True))
  elif method == 'PCGrad':
    combine = multitask.PCGrad()
  elif method == 'NashMTL':
    combine = multitask.Nash(every=1 if way == 'a bargain' else 25)
  model = dataclasses.replace(
    dit_step.our_model(), depth=DEPTH, hooks=hooks, parent=None
  )
  intervals = uniform(TASKS)
  objective = Denoise(
    model,
    times=Stratified(intervals),
    tasks=intervals,
    auxiliary=auxiliary,
  )
  contestants.serve_train_step(
    objective,
    dit_step.our_batch(),
    WORK,
    groups=groups,
    combine=combine,
    same_size=False,
  )


if __name__ == '__main__':
  serve(sys.argv[1])
