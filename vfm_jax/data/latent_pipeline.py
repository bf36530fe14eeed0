"""Turn a set of latents into batches to learn from."""

import dataclasses
from typing import Any

import numpy as np

from vfm_jax.data import examples, feed
from vfm_jax.data.batches import Batches, Limit
from vfm_jax.data.latents import Latents
from vfm_jax.data.spec import ArraySpec


@dataclasses.dataclass(frozen=True)
class LatentPipeline:
  """Draw latents from their distributions, as `Pipeline` draws clips.

  A batch is a dict of numpy arrays: `latent` f32 [B, (T,) h, w, C], which is
  (mean + std * eps - shift) * scaling, `labels` dict of int32 [B], `index`
  int32 [B] in the set, `row` int32 [B] in the global batch; in evaluations
  also `valid` bool [B] and `view` int32 [B]. What is random about an example
  comes from (seed, epoch, index), as is its order in an epoch.

  Attributes:
    source: the latents.
    sample: draw eps; otherwise the means are taken.
    flip: take the mirror image of half of the examples in training.
    shape: of a latent, (h, w, C) or (T, h, w, C), and
    labels: names of the labels: what the set is expected to hold, so that a run
      can be described where the set is not; None reads them from the set.
    threads: threads that read ahead where there are no worker processes.
    path: where the pipeline stands in the config, for messages.
  """

  source: Latents
  sample: bool = True
  flip: bool = True
  shape: tuple[int, ...] | None = None
  labels: tuple[str, ...] | None = None
  threads: int = 4
  path: str = 'data.train'

  @property
  def num_examples(self) -> int:
    """Number of examples in the set."""
    return len(self.source)

  def train_batches(
    self,
    batch_size: int,
    *,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
  ) -> Batches:
    """Iterate over training batches without end; see `Pipeline`.

    Raises:
      ValueError: the set is damaged, smaller than a batch or without mirror
        images that `flip` asks for, or the batch does not divide by the
        processes.
    """
    if self.num_examples < batch_size:
      raise ValueError(
        f'batch_size: {batch_size} is more than the {self.num_examples} '
        f'latents of {self.path}.source'
      )
    if self.flip and not self.source.about.flips:
      raise ValueError(
        f'{self.path}.flip: expected mirror images in {self.source.root}, '
        'found none: it was written with --noflips. Set it to False, or write '
        'the set again'
      )
    local = feed.local_size(batch_size, process_count)
    load = _Train(**self._shared(batch_size, local, process_index, seed))
    return self._batches(load, start_step, None, workers)

  def eval_batches(
    self,
    batch_size: int,
    *,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
  ) -> Batches:
    """Iterate once over all examples in order, none mirrored.

    The last batch is padded; its padding has `valid` False and `index` -1.
    """
    local = feed.local_size(batch_size, process_count)
    load = _Eval(**self._shared(batch_size, local, process_index, seed))
    steps = -(-self.num_examples // batch_size)
    return self._batches(load, 0, steps, workers)

  def element_spec(self, batch_size: int) -> dict[str, Any]:
    """Return shapes and types of a training batch, as `ArraySpec` leaves."""
    shape, labels = self.shape, self.labels
    if shape is None:
      shape = self.source.about.shape
    if labels is None:
      labels = self.source.about.label_names
    rows = ArraySpec((batch_size,), np.int32)
    return {
      'latent': ArraySpec((batch_size, *shape), np.float32),
      'labels': dict.fromkeys(labels, rows),
      'index': rows,
      'row': rows,
    }

  def _shared(self, batch_size, local, process_index, seed) -> dict[str, Any]:
    if not self.num_examples:
      raise ValueError(f'{self.path}.source: holds no latents')
    about = self.source.about
    for name, wanted, found in (
      ('shape', self.shape, about.shape),
      ('labels', self.labels, about.label_names),
    ):
      if wanted is not None and wanted != found:
        raise ValueError(
          f'{self.path}.{name}: expected {wanted}, found {found} in '
          f'{self.source.root}; change it (None takes what is there) or the '
          'source'
        )
    return dict(
      # This process has compared the hashes: workers need not do it again.
      source=dataclasses.replace(self.source, check_hashes=False),
      sample=self.sample,
      flip=self.flip,
      seed=seed,
      batch_size=batch_size,
      local_size=local,
      first_row=process_index * local,
    )

  def _batches(self, load, start_step, steps, workers) -> Batches:
    return feed.batches(
      load,
      examples.stack,
      # No example of a set whose hashes fit is unusable.
      Limit(rate=0.0, grace=1, path=self.path),
      start_step=start_step,
      steps=steps,
      workers=workers,
      threads=self.threads,
    )


@dataclasses.dataclass(frozen=True)
class _Load:
  """Load an example; the attributes are those of `examples.Train`."""

  source: Latents
  sample: bool
  flip: bool
  seed: int
  batch_size: int
  local_size: int
  first_row: int

  def _draw(self, index: int, epoch: int, flip: bool):
    """Return a latent and its labels."""
    about = self.source.about
    rng = examples.generator(self.seed, epoch, index)
    _, labels, moments = self.source[index]
    # Drawn in any case, so that eps is the same with and without mirroring.
    mirrored = rng.random() < 0.5
    mean, std = moments[int(flip and mirrored)]
    if self.sample:
      mean = mean + std * rng.standard_normal(mean.shape, np.float32)
    scaled = (mean - np.float32(about.shift)) * np.float32(about.scaling)
    return scaled, {k: np.int32(labels[k]) for k in about.label_names}


class _Train(_Load):
  """Load the training example at a local position; picklable."""

  def __call__(self, local: int) -> dict[str, Any]:
    row, position = examples.place(self, local)
    epoch, index = examples.shuffled(position, len(self.source), self.seed)
    latent, labels = self._draw(index, epoch, self.flip)
    return {
      'latent': latent,
      'labels': labels,
      'index': np.int32(index),
      'row': np.int32(row),
      examples.BAD: [],
    }


class _Eval(_Load):
  """Load an example of an evaluation pass, blank past its end; picklable."""

  def __call__(self, local: int) -> dict[str, Any]:
    row, index = examples.place(self, local)
    inside = index < len(self.source)
    latent, labels = self._draw(index if inside else 0, 0, False)
    return {
      'latent': latent if inside else np.zeros_like(latent),
      'labels': labels if inside else dict.fromkeys(labels, np.int32(0)),
      'index': np.int32(index if inside else -1),
      'view': np.int32(0),
      'row': np.int32(row),
      'valid': np.bool_(inside),
      examples.BAD: [] if inside else None,
    }
