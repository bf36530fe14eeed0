"""Take turns between pipelines, such as videos and images."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from vfm_jax.data import batches as batches_lib
from vfm_jax.data.pipeline import Pipeline


@dataclasses.dataclass(frozen=True)
class Mixed:
  """Train on one pipeline a step, in a rotation that the step decides.

  Batches of different pipelines may differ in shape (an image is a clip of one
  frame): the step is compiled once for each. Evaluations, pictures and what is
  described are of the first pipeline.

  Attributes:
    pipelines: what takes turns.
    turns: steps of each in a rotation, in which they are spread evenly.
    path: where this stands in the config, for messages.
  """

  pipelines: tuple[Pipeline, ...]
  turns: tuple[int, ...] = (1, 1)
  path: str = 'data.train'

  def __post_init__(self):
    """Refuse turns that are not those of the pipelines."""
    count = len(self.pipelines)
    if not count or len(self.turns) != count or min(self.turns) < 1:
      raise ValueError(
        f'{self.path}.turns: expected a positive number for each of the '
        f'{count} {self.path}.pipelines, found {self.turns}'
      )

  @property
  def num_examples(self) -> int:
    """Number of videos in all sources."""
    return sum(p.num_examples for p in self.pipelines)

  def train_batches(
    self, batch_size: int, *, start_step: int = 0, **how: Any
  ) -> 'MixedBatches':
    """Iterate over training batches without end; see `Pipeline`.

    Args:
      batch_size: of the global batch, whatever it is of.
      start_step: step of the first batch.
      **how: `seed`, `process_index`, `process_count` and `workers`, which
        every pipeline has of its own.
    """
    rotation = self.rotation()
    turns, rest = divmod(start_step, len(rotation))
    begun = [
      turns * n + rotation[:rest].count(i) for i, n in enumerate(self.turns)
    ]
    parts = [
      pipeline.train_batches(batch_size, start_step=step, **how)
      for pipeline, step in zip(self.pipelines, begun, strict=True)
    ]
    return MixedBatches(parts, rotation, start_step)

  def eval_batches(self, batch_size: int, **how: Any) -> batches_lib.Batches:
    """Iterate once over the first pipeline; see `Pipeline`."""
    return self.pipelines[0].eval_batches(batch_size, **how)

  def element_spec(self, batch_size: int) -> dict[str, Any]:
    """Return shapes and types of a batch of the first pipeline."""
    return self.pipelines[0].element_spec(batch_size)

  def rotation(self) -> list[int]:
    """Return the pipeline of each step of a rotation.

    Always the one that is furthest behind its share; the first of those.
    """
    total, taken, out = sum(self.turns), [0] * len(self.turns), []
    for step in range(1, total + 1):
      behind = [
        step * n - total * k for n, k in zip(self.turns, taken, strict=True)
      ]
      i = behind.index(max(behind))
      taken[i] += 1
      out.append(i)
    return out


class MixedBatches(Iterator[Mapping[str, Any]]):
  """Iterate over the batches of several pipelines in turn."""

  def __init__(
    self,
    parts: list[batches_lib.Batches],
    rotation: list[int],
    step: int,
  ):
    self._parts, self._rotation, self._step = parts, rotation, step

  @property
  def stats(self) -> batches_lib.Stats:
    """Return what this process has read so far, of all of them."""
    out = batches_lib.Stats()
    for part in self._parts:
      out.seen += part.stats.seen
      out.replaced += part.stats.replaced
      out.bad |= part.stats.bad
      out.wait_s += part.stats.wait_s
    return out

  def __next__(self) -> Mapping[str, Any]:
    part = self._parts[self._rotation[self._step % len(self._rotation)]]
    self._step += 1
    return next(part)

  def close(self) -> None:
    """Stop the threads and processes that read ahead."""
    for part in self._parts:
      part.close()

  def __enter__(self) -> 'MixedBatches':
    return self

  def __exit__(self, *exc: object) -> None:
    self.close()
