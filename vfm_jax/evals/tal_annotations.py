"""Read annotations of actions in long videos.

They come in the layout of ActivityNet, which THUMOS14 is passed on in as well:
{"database": {id: {"subset": ..., "duration": s, "annotations": [{"segment":
[start s, end s], "label": name[, "label_id": class]}]}}}.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from absl import logging

from vfm_jax.evals.store import StoreError, read_json

# Annotations of one class whose ends differ by no more are the same.
_SAME = 1e-3


class Instance(NamedTuple):
  """Hold an action: start and end in seconds, and its class."""

  start: float
  end: float
  label: int


@dataclasses.dataclass(frozen=True)
class Annotations:
  """Hold the annotations of a data set.

  Attributes:
    path: the file.
    classes: names by class.
    subsets: {lower-case subset: {video id: its actions}}.
    durations: {video id: seconds}, where they are given.
  """

  path: str
  classes: tuple[str, ...]
  subsets: Mapping[str, Mapping[str, tuple[Instance, ...]]]
  durations: Mapping[str, float]

  def subset(self, name: str) -> Mapping[str, tuple[Instance, ...]]:
    """Return {video id: actions} of a subset, of any case.

    Raises:
      StoreError: there is no such subset.
    """
    if name.lower() not in self.subsets:
      raise StoreError(
        f'{self.path}: no subset {name!r}; it has {sorted(self.subsets)}'
      )
    return self.subsets[name.lower()]


def read_annotations(
  path: str, *, invalid: Literal['error', 'drop'] = 'error'
) -> Annotations:
  """Read an annotation file.

  Classes are the `label_id` of the file; where it has none, as in the release
  of ActivityNet, the place of the name among all names in order (ours).

  Args:
    path: the json.
    invalid: what to do with an action that does not end after it starts:
      refuse the file, or drop the action and log its video.

  Raises:
    StoreError: the file is not in this layout; the message names the video.
  """
  database = read_json(pathlib.Path(path)).get('database')
  if not isinstance(database, dict) or not database:
    raise StoreError(f'{path}: expected "database": {{video id: ...}}')
  names = _class_names(path, database)
  by_name = {name: label for label, name in names.items()}
  subsets: dict[str, dict[str, tuple[Instance, ...]]] = {}
  durations = {}
  for video, entry in database.items():
    where = f'{path}: database[{video!r}]'
    if not isinstance(entry, dict) or not isinstance(entry.get('subset'), str):
      raise StoreError(f'{where}: expected an object with a "subset"')
    actions = []
    for action in entry.get('annotations') or ():
      start, end = _segment(where, action)
      if end <= start:
        if invalid == 'error':
          raise StoreError(
            f'{where}: an action ends at {end} s and starts at {start} s; '
            "correct the file, or drop such actions by invalid='drop'"
          )
        logging.warning(
          '%s: dropped an action from %s to %s s', where, start, end
        )
        continue
      label = action.get('label_id', by_name.get(action.get('label')))
      actions.append(Instance(start, end, int(label)))
    subsets.setdefault(entry['subset'].lower(), {})[video] = tuple(actions)
    if entry.get('duration') is not None:
      durations[video] = float(entry['duration'])
  classes = tuple(
    names.get(i, str(i)) for i in range(max(names, default=-1) + 1)
  )
  return Annotations(str(path), classes, subsets, durations)


def without_duplicates(actions: Sequence[Instance]) -> tuple[Instance, ...]:
  """Leave out what has the class and, to 1e-3 s, the ends of an earlier one."""
  kept: list[Instance] = []
  for a in actions:
    if not any(
      a.label == b.label
      and abs(a.start - b.start) <= _SAME
      and abs(a.end - b.end) <= _SAME
      for b in kept
    ):
      kept.append(a)
  return tuple(kept)


def _class_names(path: str, database: Mapping) -> dict[int, str]:
  """Return {class: name}."""
  names: dict[int, str] = {}
  plain = set()
  for video, entry in database.items():
    if not isinstance(entry, dict):
      continue
    for action in entry.get('annotations') or ():
      label, name = action.get('label_id'), action.get('label')
      if label is not None:
        if not isinstance(label, int) or label < 0:
          raise StoreError(
            f'{path}: database[{video!r}]: label_id must be a whole number of '
            f'0 or more, found {label!r}'
          )
        names.setdefault(label, str(name) if name is not None else str(label))
      elif isinstance(name, str):
        plain.add(name)
      else:
        raise StoreError(
          f'{path}: database[{video!r}]: an action has neither label nor '
          'label_id'
        )
  if names and plain:
    raise StoreError(
      f'{path}: some actions have a label_id and some, such as '
      f'{min(plain)!r}, have none'
    )
  return names or dict(enumerate(sorted(plain)))


def _segment(where: str, action: Mapping) -> tuple[float, float]:
  try:
    start, end = (float(x) for x in action['segment'])
  except (KeyError, TypeError, ValueError) as e:
    raise StoreError(
      f'{where}: expected "segment": [start s, end s], found '
      f'{action.get("segment")!r}'
    ) from e
  if not (math.isfinite(start) and math.isfinite(end)):
    raise StoreError(f'{where}: a segment is not finite: {start}, {end}')
  return start, end
