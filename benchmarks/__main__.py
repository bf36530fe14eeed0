"""Run the benchmarks, print one table and write it with all times.

    python -m benchmarks [masked_step dit_step ...] [--rounds 9]

`masked_step`, `dit_step`, `dit_sampling` and `knn` need the extra `parity`
(torch, transformers, diffusers) and, for torch.compile, a C++ compiler; `mfu`
without an accelerator, and `tpu_schedules`, the extra `tpu`. Peers run in the
interpreter that the variable PEER_PYTHON names, if it does: torch may be in
another environment.
"""

import argparse
import importlib
import pathlib
import sys

from benchmarks import results

NAMES = (
  'masked_step',
  'dit_step',
  'dit_sampling',
  'multitask_step',
  'multitask_pairs',
  'knn',
  'loop_overhead',
  'decoding',
  'input_pipeline',
  'sampling',
  'mfu',
  'tpu_schedules',
)


def main(argv: list[str]) -> int:
  """Return the exit status: 1 if a bar was missed."""
  parser = argparse.ArgumentParser(prog='python -m benchmarks')
  parser.add_argument('names', nargs='*', help=f'some of {", ".join(NAMES)}')
  parser.add_argument('--rounds', type=int, default=9)
  parser.add_argument('--out', default='runs/benchmarks', metavar='PATH')
  args = parser.parse_args(argv)
  if unknown := set(args.names) - set(NAMES):
    parser.error(f'unknown {sorted(unknown)}; choose from {", ".join(NAMES)}')
  comparisons = []
  for name in args.names or NAMES:
    print(f'{name} ...', file=sys.stderr, flush=True)
    module = importlib.import_module(f'benchmarks.{name}')
    found = module.run(args.rounds)
    comparisons += found if isinstance(found, list) else [found]
  table = results.table(comparisons)
  print(table)
  out = pathlib.Path(args.out)
  results.write(out.with_suffix('.json'), comparisons)
  out.with_suffix('.md').write_text(table)
  return int(any(c.missed() for c in comparisons))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
