"""Build HTML and SVG as text in which nothing goes unescaped."""

import html
import json
from typing import Any


class Html(str):
  """Mark text as HTML that is complete and escaped already."""

  __slots__ = ()


def el(name: str, *children: Any, **attributes: Any) -> Html:
  """Return an element.

  Args:
    name: of the tag.
    *children: elements, or anything else, which is escaped; None is left out.
    **attributes: a trailing `_` is dropped and other `_` become `-`; None and
      False are left out, True stands alone, floats are rounded to 2 digits.
  """
  shown = []
  for key, value in attributes.items():
    key = key.rstrip('_').replace('_', '-')
    if value is None or value is False:
      continue
    if value is True:
      shown.append(f' {key}')
      continue
    if isinstance(value, float):
      value = f'{value:.2f}'.rstrip('0').rstrip('.')
    shown.append(f' {key}="{html.escape(str(value))}"')
  inside = join(*children)
  return Html(f'<{name}{"".join(shown)}>{inside}</{name}>')


def join(*children: Any) -> Html:
  """Return children one after the other, escaped as in `el`."""
  return Html(
    ''.join(
      c if isinstance(c, Html) else html.escape(str(c))
      for c in children
      if c is not None
    )
  )


def data(identifier: str, value: Any) -> Html:
  """Return an element with json for a script, by its id.

  No text in it can end the element.
  """
  text = json.dumps(value, allow_nan=False, separators=(',', ':'))
  for char in '<>&':
    text = text.replace(char, f'\\u{ord(char):04x}')
  return Html(
    f'<script type="application/json" id="{html.escape(identifier)}">'
    f'{text}</script>'
  )
