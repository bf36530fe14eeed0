"""Sum up sets of images for the metrics, a part of the set at a time."""

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from vfm_jax import sharding
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.evals.embed import embed
from vfm_jax.evals.frechet import Moments, Normal
from vfm_jax.evals.networks import Network
from vfm_jax.objectives.base import Batch

# Images whose activations are in memory at a time, unless they are kept.
CHUNK = 4096


class Summary(NamedTuple):
  """Hold what the metrics need of a set of images.

  Attributes:
    count: number of images; 0 if only statistics are known.
    normals: distributions by part of the activations.
    rows: f32 [count, D] activations by part, where they are kept.
  """

  count: int
  normals: Mapping[str, Normal]
  rows: Mapping[str, np.ndarray]


def summarise(
  network: Network,
  chunks: Iterable[Iterable[Batch]],
  *,
  moments: Collection[str],
  keep: Collection[str] = (),
  mesh: jax.sharding.Mesh | None = None,
) -> Summary:
  """Run a network over images and sum up what it says.

  Args:
    network: what reads the images.
    chunks: batches as `evals.embed.embed` takes them, in parts that fit into
      memory.
    moments: parts of the activations to fit a normal distribution to.
    keep: parts to keep whole.
    mesh: devices to split a batch over; None uses one.

  Raises:
    ValueError: an activation is not finite, or there are too few images.
  """
  params = network.load()
  place = None if mesh is None else sharding.replicated(mesh)
  params = jax.device_put(params, place)
  found: dict[str, Moments] = {}
  kept: dict[str, list[np.ndarray]] = {part: [] for part in keep}
  count = 0
  for batches in chunks:
    x = embed(network, params, batches, mesh=mesh).x
    count += len(x)
    for part, rows in _parts(network, x).items():
      if part in moments:
        new = Moments.of(rows)
        found[part] = found[part].merge(new) if part in found else new
      if part in keep:
        kept[part].append(rows)
  normals = {part: m.normal() for part, m in found.items()}
  rows = {part: np.concatenate(parts) for part, parts in kept.items()}
  return Summary(count, normals, rows)


def image_batches(
  images: np.ndarray,
  batch_size: int,
  mesh: jax.sharding.Mesh | None = None,
) -> Iterator[Batch]:
  """Yield this process's rows of batches of images uint8 [N, T, H, W, 3]."""
  slot, slots = sharding.process_slot(mesh)
  for first in range(0, len(images), batch_size):
    rows = np.arange(first, first + batch_size, dtype=np.int32)
    rows = np.split(rows, slots)[slot]
    yield {
      'video': images[np.minimum(rows, len(images) - 1)],
      'index': rows,
      'valid': rows < len(images),
    }


def image_chunks(
  images: np.ndarray,
  batch_size: int,
  mesh: jax.sharding.Mesh | None = None,
) -> Iterator[Iterable[Batch]]:
  """Yield the batches of images uint8 [N, H, W, 3] in parts."""
  step = chunk_size(batch_size)
  for first in range(0, len(images), step):
    part = images[first : first + step, None]
    yield image_batches(part, batch_size, mesh)


def pipeline_chunks(
  pipeline: Pipeline,
  batch_size: int,
  count: int | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> Iterator[Iterable[Batch]]:
  """Yield the batches of the first `count` images of a pipeline in parts."""
  slot, slots = sharding.process_slot(mesh)
  images = (count or pipeline.num_examples) * pipeline.views
  total = -(-images // batch_size)
  each = chunk_size(batch_size) // batch_size
  with pipeline.eval_batches(
    batch_size, process_index=slot, process_count=slots
  ) as batches:
    limited = (_limit(b, count) for b in itertools.islice(batches, total))
    for _ in range(0, total, each):
      yield itertools.islice(limited, each)


def chunk_size(batch_size: int) -> int:
  """Return the number of images in a part: whole batches."""
  return batch_size * max(1, CHUNK // batch_size)


def _limit(batch: Batch, count: int | None) -> Batch:
  """Mark what comes after `count` images as padding."""
  if count is None:
    return batch
  return {**batch, 'valid': batch['valid'] & (batch['index'] < count)}


def _parts(network: Network, x: np.ndarray) -> dict[str, np.ndarray]:
  ends = np.cumsum(list(network.parts.values()))
  return dict(zip(network.parts, np.split(x, ends[:-1], axis=1), strict=True))
