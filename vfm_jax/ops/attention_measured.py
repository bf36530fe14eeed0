"""Record where our GPU kernel was measured to be faster than what else runs.

`ops.attention.resolve` takes it unasked only there. Rows come from
`python -m benchmarks attention` on the card that they name, in milliseconds
of forward and backward together.
"""

import dataclasses
from collections.abc import Sequence

from vfm_jax.ops.attention_spec import Spec


@dataclasses.dataclass(frozen=True)
class Row:
  """Hold one measured shape.

  Attributes:
    device_kind: the card, as JAX calls it.
    dtype: element type.
    head_dim: features of a head.
    tokens: number of queries and of keys.
    ours_ms: time of our kernel.
    best_ms: time of the best of the others.
    jax: version of JAX.
    date: day of the measurement, as '2026-11-22'.
  """

  device_kind: str
  dtype: str
  head_dim: int
  tokens: int
  ours_ms: float
  best_ms: float
  jax: str
  date: str


# Nobody has run the kernel on a card yet.
ROWS: tuple[Row, ...] = ()


def defer(spec: Spec, rows: Sequence[Row]) -> str | None:
  """Say why not to take our kernel unasked; None if it is the faster one.

  The row of the nearest length, at most a quarter away, decides.
  """
  same = [
    r
    for r in rows
    if (r.device_kind, r.dtype, r.head_dim)
    == (spec.device_kind, spec.dtype, spec.head_dim)
    and abs(r.tokens - spec.keys) <= spec.keys / 4
  ]
  if not same or spec.queries != spec.keys:
    return (
      'was not measured for this shape on '
      f"{spec.device_kind or 'this device'}; impl='pallas_gpu' takes it"
    )
  row = min(same, key=lambda r: abs(r.tokens - spec.keys))
  if row.ours_ms >= row.best_ms:
    return (
      f'took {row.ours_ms:g} ms where another took {row.best_ms:g} ms '
      f"({row.date}, jax {row.jax}); impl='pallas_gpu' takes it"
    )
  return None
