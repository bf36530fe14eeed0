"""Time the methods whose bars are a few percent, single steps in turn.

The contestants are those of `multitask_step`. The speed of a machine that
others share swings by more than those bars within seconds: so steps alternate
one by one, and there are many of them.
"""

from benchmarks import interleave, multitask_step, results

BARS = {'DTR': 1.03, 'Switch-DiT, merged': 1.12}


def run(rounds: int) -> results.Comparison:
  """Compare the train steps, in 25 turns a round."""
  seconds, info = interleave.compare(
    [multitask_step.contestant(n) for n in (multitask_step.PLAIN, *BARS)],
    rounds=25 * rounds,
    repeats=1,
    settle=0.1,
  )
  return results.Comparison(
    title=f'{multitask_step.TITLE}, in turn',
    reference=multitask_step.PLAIN,
    seconds=seconds,
    bars=BARS,
    notes=f'{multitask_step.METHODS} {multitask_step.MACHINE}',
    info=info,
  )
