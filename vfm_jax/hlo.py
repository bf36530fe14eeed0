"""Read the text of a compiled XLA module into instructions.

What is read is what a cost needs: names, shapes, operands, called computations
and trip counts.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$')
_NAME = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = ')
_OPCODE = re.compile(r'\s*([a-z][\w\-]*)\(')
_ARRAY = re.compile(r'\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]')
_COMMENT = re.compile(r'/\*.*?\*/')
_CALLED = re.compile(
  r'\b(?:calls|to_apply|body|condition|branch_computations|true_computation'
  r'|false_computation|called_computations)=(\{[^}]*\}|%?[\w.\-]+)'
)
_TRIPS = re.compile(r'known_trip_count[":={\s]+n[":\s]+(\d+)')
_CONSTANT = re.compile(r's32\[\]\S* constant\((\d+)\)')

# Bits of the element types whose name does not end in them.
_BITS = {'pred': 8, 'token': 0, 'opaque': 0}


@dataclasses.dataclass(frozen=True)
class Shape:
  """Hold the element type and the dimensions of an array."""

  dtype: str
  dims: tuple[int, ...]

  @property
  def size(self) -> int:
    """Return the number of elements."""
    return math.prod(self.dims)

  @property
  def nbytes(self) -> int:
    """Return its bytes, without padding."""
    if self.dtype in _BITS:
      bits = _BITS[self.dtype]
    else:
      # bf16, s32, f8e4m3fn, c64.
      found = re.match(r'[a-z]+?(\d+)', self.dtype)
      bits = int(found[1]) if found else 0
    return -(-self.size * bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """Hold one line of a computation.

  Attributes:
    name: unique in the module.
    opcode: as in 'fusion' or 'all-gather-start'.
    results: arrays that it returns; several of a tuple.
    operands: names of instructions of the same computation.
    text: the whole line.
  """

  name: str
  opcode: str
  results: tuple[Shape, ...]
  operands: tuple[str, ...]
  text: str

  @property
  def called(self) -> dict[str, list[str]]:
    """Return the computations that it calls, by attribute."""
    return {
      found[0].partition('=')[0]: re.findall(r'%?([\w.\-]+)', found[1])
      for found in _CALLED.finditer(self.text)
    }

  @property
  def op_name(self) -> str:
    """Return where in the program it is from, '' if unknown."""
    found = re.search(r'op_name="([^"]*)"', self.text)
    return found[1] if found else ''

  def attribute(self, name: str) -> str | None:
    """Return the value of a quoted attribute or of an entry of its config."""
    found = re.search(rf'"?{name}"?[=:]\s*"([^"]*)"', self.text)
    return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Module:
  """Hold the computations of a module by name, and the name of the first."""

  computations: Mapping[str, tuple[Instruction, ...]]
  entry: str

  def trips(self, loop: Instruction) -> int:
    """Return how often a while loop runs; 1 if it is not known.

    XLA writes it down where it knows; else it is the largest constant that the
    condition compares with.
    """
    if found := _TRIPS.search(loop.text):
      return int(found[1])
    (condition,) = loop.called['condition']
    texts = [i.text for i in self.computations[condition]]
    return max((int(n) for t in texts for n in _CONSTANT.findall(t)), default=1)


def parse(text: str) -> Module:
  """Return the module of `compiled.as_text()`.

  Raises:
    ValueError: it has no entry.
  """
  computations: dict[str, list[Instruction]] = {}
  entry, lines = '', None
  for line in text.splitlines():
    if lines is not None and line.startswith('}'):
      lines = None
    elif lines is not None:
      if (found := _instruction(line)) is not None:
        lines.append(found)
    elif header := _HEADER.match(line):
      lines = computations.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
  if not entry:
    raise ValueError('expected the text of a compiled module with an ENTRY')
  return Module({k: tuple(v) for k, v in computations.items()}, entry)


def arrays(text: str) -> tuple[Shape, ...]:
  """Return the arrays of a type, such as '(f32[2,3]{1,0}, s32[])'."""
  return tuple(
    Shape(dtype, tuple(int(n) for n in dims.split(',') if n))
    for dtype, dims in _ARRAY.findall(text)
  )


def _instruction(line: str) -> Instruction | None:
  line = _COMMENT.sub('', line)
  named = _NAME.match(line)
  if named is None:
    return None
  rest = line[named.end() :]
  # A type is one word, or a tuple in parentheses, whose layouts have some too.
  end = _closing(rest, 0) + 1 if rest.startswith('(') else rest.find(' ')
  opcode = _OPCODE.match(rest, end)
  if opcode is None:
    return None
  last = _closing(rest, opcode.end() - 1)
  inside = rest[opcode.end() : last]
  return Instruction(
    named[1],
    opcode[1],
    arrays(rest[:end]),
    tuple(_operands(inside)),
    line,
  )


def _operands(text: str) -> list[str]:
  """Return the names among operands, which may have their types before them."""
  if '%' in text:
    return re.findall(r'%([\w.\-]+)', text)
  return [part.split()[-1] for part in text.split(',') if part.strip()]


def _closing(text: str, start: int) -> int:
  """Return the index of the parenthesis that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += {'(': 1, ')': -1}.get(text[i], 0)
    if depth == 0:
      return i
  return len(text)
