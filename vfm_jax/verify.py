"""Check a conversion: counts, every tensor, what is restored, embeddings."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from vfm_jax import convert, sharding, trees
from vfm_jax.evals.base import to_host
from vfm_jax.evals.embed import embed
from vfm_jax.experiment import Experiment
from vfm_jax.objectives.base import Embeds

# Embeddings that differ by less than this part of their size are constant.
_RELATIVE = 1e-4


class Check(NamedTuple):
  """Hold one line of the table.

  Attributes:
    what: is checked.
    expected: what it should be.
    found: what it is.
    passed: whether that will do.
  """

  what: str
  expected: str
  found: str
  passed: bool


class VerificationError(ValueError):
  """Say which checks of a conversion failed."""


def check_weights(
  objective: Any, params: Any, names: Iterable[str], usage: convert.Usage
) -> list[Check]:
  """Check the number of parameters, and that each tensor has its use.

  Args:
    objective: of the parameters; may know the published number, `num_params`.
    params: that were read.
    names: of all tensors of the file.
    usage: what became of them.
  """
  count = sum(np.size(x) for x in jax.tree.leaves(params))
  published = getattr(objective, 'num_params', None)
  checks = [
    Check(
      'parameters',
      'not published' if published is None else f'{published:,}',
      f'{count:,}',
      published in (None, count),
    )
  ]
  # A stacked tensor of a file is used layer by layer.
  whole = {re.sub(r'\[\d+\]$', '', n): n for n in usage.used}
  left_out = {re.sub(r'\[\d+\]$', '', n): r for n, r in usage.left_out.items()}
  names = set(names)
  lost = names - whole.keys() - left_out.keys()
  checks.append(
    Check(
      'tensors',
      f'{len(names)} used or left out for a reason',
      f'{len(names & whole.keys())} used, {len(names & left_out.keys())} left '
      f'out{_some(lost)}',
      not lost,
    )
  )
  for reason in sorted(set(left_out.values())):
    those = {n for n, r in left_out.items() if r == reason}
    checks.append(Check('left out', reason, _some(those)[2:], True))
  return checks


def check_checkpoint(
  exp: Experiment, workdir: str, params: Any, mesh: jax.sharding.Mesh
) -> list[Check]:
  """Check that the checkpoint restores, and embeds synthetic clips.

  Args:
    exp: whose checkpoint it is.
    workdir: that holds it.
    params: that were written.
    mesh: of the devices.
  """
  with sharding.activations(mesh):
    restored = exp.restore(workdir, mesh).params
    changed = [
      path
      for (path, a), b in zip(
        trees.path_leaves(restored), jax.tree.leaves(params), strict=True
      )
      if not np.array_equal(to_host(a), np.asarray(b))
    ]
    checks = [
      Check(
        'restored',
        'equal to what was read',
        f'{len(changed)} parameters differ{_some(changed)}',
        not changed,
      )
    ]
    if not isinstance(exp.objective, Embeds):
      kind = type(exp.objective).__name__
      return [*checks, Check('embeddings', 'none', f'{kind} has none', True)]
    return checks + _check_embeddings(exp, restored, mesh)


def require(checks: Sequence[Check]) -> None:
  """Accept checks that all passed.

  Raises:
    VerificationError: one did not; it has the table.
  """
  failed = [c.what for c in checks if not c.passed]
  if failed:
    raise VerificationError(
      f'the conversion failed its checks of {", ".join(failed)}; nothing is '
      f'kept of it\n{table(checks)}'
    )


def table(checks: Sequence[Check]) -> str:
  """Return the checks as a table; the last column says what failed."""
  rows = [('check', 'expected', 'found', '')]
  rows += [
    (c.what, c.expected, c.found, 'ok' if c.passed else 'FAILED')
    for c in checks
  ]
  widths = [max(len(row[i]) for row in rows) for i in range(3)]
  lines = []
  for *cells, verdict in rows:
    padded = [x.ljust(w) for x, w in zip(cells, widths, strict=True)]
    lines.append('  '.join([*padded, verdict]))
  return '\n'.join(lines)


def _check_embeddings(exp, params, mesh):
  slots = math.prod(mesh.shape[axis] for axis in sharding.BATCH)
  count = slots * -(-2 // slots)
  index, processes = sharding.process_slot(mesh)
  video = np.split(_clips(exp.batch_spec['video'].shape[1:], count), processes)
  what = f'embeddings of {count} clips'
  try:
    out = embed(exp.objective, params, [{'video': video[index]}], mesh=mesh)
  except ValueError as e:
    return [Check(what, 'finite', str(e), False)]
  x = out.x.astype(np.float64)
  size = np.abs(x).max()
  over_features, over_clips = x.std(1).min(), np.ptp(x, axis=0).max()
  return [
    Check(what, 'finite', f'{list(x.shape)}, all finite', True),
    Check(
      'over features',
      f'deviation above {_RELATIVE:g} of the largest',
      f'{over_features:.3g} of {size:.3g}',
      bool(over_features > _RELATIVE * size),
    ),
    Check(
      'over clips',
      f'difference above {_RELATIVE:g} of the largest',
      f'{over_clips:.3g} of {size:.3g}',
      bool(over_clips > _RELATIVE * size),
    ),
  ]


def _clips(shape: tuple[int, ...], count: int) -> np.ndarray:
  """Return blocks of random colours that move, uint8 [count, T, H, W, C]."""
  frames, height, width, channels = shape
  rng = np.random.default_rng(0)
  blocks = rng.integers(
    0, 256, (count, -(-height // 8), -(-width // 8), channels), np.uint8
  )
  picture = blocks.repeat(8, 1).repeat(8, 2)[:, :height, :width]
  moving = [np.roll(picture, 2 * t, axis=2) for t in range(frames)]
  return np.stack(moving, axis=1)


def _some(names: Iterable[str]) -> str:
  """Return the first of some names, after a comma; '' for none."""
  names = sorted(names)
  more = f' and {len(names) - 3} more' if len(names) > 3 else ''
  return f', {", ".join(names[:3])}{more}' if names else ''
