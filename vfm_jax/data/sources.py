"""Say what a source is, and what sources share.

A source lists examples and opens none: `source[i]` gives a `Video` whose
`open` reads the file. Sources are frozen dataclasses that pickle small, so
that worker processes receive the description and never the data.
"""

from typing import Protocol, runtime_checkable

from vfm_jax.data import video

VIDEO_SUFFIXES = (
  '.avi', '.gif', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm',
)  # fmt: skip


@runtime_checkable
class Source(Protocol):
  """What the pipeline needs of a set of videos."""

  @property
  def label_names(self) -> tuple[str, ...]:
    """Names of the labels that every example carries."""
    ...

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> video.Video:
    """Describe example `index`.

    Raises:
      IndexError: the index is outside [0, len).
      BadVideo: this example can't be used, for example a bad label.
    """
    ...


def check_index(index: int, length: int) -> None:
  """Raise `IndexError` unless 0 <= index < length."""
  if not 0 <= index < length:
    raise IndexError(f'example {index} of a source of {length}')
