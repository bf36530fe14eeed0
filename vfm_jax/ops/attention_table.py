"""Tell which implementation of attention runs where, and why not another."""

import contextlib
import contextvars
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from vfm_jax.ops.attention_spec import Spec


class Resolved(NamedTuple):
  """Hold what became of a call.

  Attributes:
    spec: the call.
    impl: the implementation that was asked for, or 'auto'.
    name: the one that runs.
    refusals: why those before it do not, by name.
  """

  spec: Spec
  impl: str
  name: str
  refusals: tuple[tuple[str, str], ...]


# Keys in the order in which they came.
_RECORD: contextvars.ContextVar[dict[Resolved, None] | None] = (
  contextvars.ContextVar('attention_record', default=None)
)


@contextlib.contextmanager
def recorded() -> Iterator[dict[Resolved, None]]:
  """Collect the different calls that are traced in this context, as keys."""
  calls: dict[Resolved, None] = {}
  token = _RECORD.set(calls)
  try:
    yield calls
  finally:
    _RECORD.reset(token)


def record(
  spec: Spec, impl: str, name: str, refusals: Mapping[str, str]
) -> None:
  """Note a call for whoever is collecting."""
  calls = _RECORD.get()
  if calls is not None:
    call = Resolved(spec, impl, name, tuple(refusals.items()))
    calls[call] = None


def table(calls: Iterable[Resolved]) -> str:
  """Return one line a call, then why implementations were passed over.

  Args:
    calls: from `recorded`.
  """
  calls = list(calls)
  if not calls:
    return 'attention: no calls'
  head = ('batch', 'queries', 'keys', 'heads', 'dim', 'type', 'with', 'runs')
  rows = [head, *dict.fromkeys(_row(c.spec, c.name) for c in calls)]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    '  '.join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip()
    for row in rows
  ]
  devices = dict.fromkeys(c.spec.device_kind or c.spec.platform for c in calls)
  reasons = dict.fromkeys(
    f'  not {name} for {c.name}: {reason}'
    for c in calls
    for name, reason in c.refusals
  )
  title = f'attention on {", ".join(devices)}, by device:'
  return '\n'.join([title, *('  ' + line for line in lines), *reasons])


def _row(spec: Spec, name: str) -> tuple[str, ...]:
  heads = f'{spec.heads}'
  if spec.kv_heads != spec.heads:
    heads += f'/{spec.kv_heads}'
  options = (
    ('mask', spec.masked),
    ('segments', spec.segments),
    ('cap', spec.logit_cap),
  )
  given = '+'.join(option for option, there in options if there)
  sizes = (spec.batch, spec.queries, spec.keys)
  return (
    *map(str, sizes), heads, str(spec.head_dim), spec.dtype, given or '-', name
  )  # fmt: skip
