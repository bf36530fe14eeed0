"""Take some examples of a source."""

import dataclasses
import functools

from vfm_jax.data import sources, video


@dataclasses.dataclass(frozen=True)
class WithLabel:
  """Keep the examples of some classes, in their order.

  Attributes:
    source: the examples.
    label: name of a label.
    classes: values of it to keep.
  """

  source: sources.Source
  label: str
  classes: tuple[int, ...]

  def __post_init__(self):
    if self.label not in self.source.label_names:
      raise ValueError(
        f'data.source.label: no label {self.label!r}; the source has '
        f'{sorted(self.source.label_names)}'
      )

  @property
  def label_names(self) -> tuple[str, ...]:
    """Names of the labels."""
    return self.source.label_names

  @functools.cached_property
  def indices(self) -> tuple[int, ...]:
    """Numbers of the kept examples in `source`; opens no video."""
    return tuple(i for i in range(len(self.source)) if self._kept(i))

  def _kept(self, index: int) -> bool:
    try:
      return self.source[index].labels[self.label] in self.classes
    except video.BadVideo:
      return False

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, index: int) -> video.Video:
    sources.check_index(index, len(self))
    return self.source[self.indices[index]]
