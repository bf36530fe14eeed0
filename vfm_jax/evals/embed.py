"""Turn clips into embeddings, in memory or on disk."""

import collections
import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vfm_jax import sharding
from vfm_jax.data.pipeline import Pipeline, VideoClips
from vfm_jax.data.sources import VIDEO_SUFFIXES
from vfm_jax.evals import store
from vfm_jax.evals.base import Features, Held, to_host
from vfm_jax.objectives.base import Batch, Embeds, PyTree

# Batches on their way through the device; bounds what waits in its memory.
_IN_FLIGHT = 2


class Embedded(NamedTuple):
  """Hold the embeddings of the valid clips, in the order of their source.

  Attributes:
    x: f32 [N, D].
    labels: int32 [N] by label name.
    index: int32 [N] example of the source; several views share one.
  """

  x: np.ndarray
  labels: dict[str, np.ndarray]
  index: np.ndarray

  def features(self, label: str) -> Features:
    """Return them for the probes, the views of an example as its rows.

    Raises:
      ValueError: there is no such label.
    """
    if label not in self.labels:
      raise ValueError(
        f'no label {label!r}; the data has {sorted(self.labels)}'
      )
    _, first, video = np.unique(
      self.index, return_index=True, return_inverse=True
    )
    y = self.labels[label][first]
    return Features(self.x, y, video.astype(np.int32))


def embed(
  objective: Any,
  params: PyTree,
  batches: Iterable[Batch],
  *,
  mesh: jax.sharding.Mesh | None = None,
) -> Embedded:
  """Embed every valid clip.

  Args:
    objective: one that satisfies `Embeds`.
    params: its parameters.
    batches: of one size, as `Pipeline.eval_batches` yields them; on several
      processes each passes its own rows. Rows that are not `valid` are left
      out of the result.
    mesh: devices to split a batch over; None uses one.

  Raises:
    TypeError: the objective has no `embed`.
    ValueError: there are no batches, or an embedding is not finite.
  """
  _check_embeds(objective)
  rows = list(_rows(Held(objective), params, batches, mesh))
  if not rows:
    raise ValueError('no batches to embed: the data is empty')
  out = jax.tree.map(lambda *xs: np.concatenate(xs), *rows)
  order = np.lexsort((out['view'], out['index']))
  order = order[out['valid'][order]]
  x = out['x'][order]
  if not len(x):
    raise ValueError('no valid clip to embed: none of the data is usable')
  bad = ~np.isfinite(x).all(1)
  if bad.any():
    raise ValueError(
      f'{bad.sum()} of {len(x)} embeddings are not finite; the first is of '
      f'example {out["index"][order][bad][0]}'
    )
  labels = {k: v[order] for k, v in out['labels'].items()}
  return Embedded(x, labels, out['index'][order])


def write_embeddings(
  objective: Any,
  params: PyTree,
  pipeline: Pipeline,
  root: str | os.PathLike,
  dataset: str,
  split: str,
  *,
  sampling: store.Sampling = 'uniform',
  annotation: str | None = None,
  batch_size: int = 32,
  mesh: jax.sharding.Mesh | None = None,
) -> int:
  """Embed every video of a pipeline into a store; see `evals/store.py`.

  A video is written as soon as its last clip is embedded. On several
  processes all decode everything and the first one writes.

  Args:
    objective: one that satisfies `Embeds`.
    params: its parameters.
    pipeline: its clip sampler decides the clips: `clips.uniform` for uniform,
      `clips.multi_clip` for multi-clip embeddings.
    root: folder of the store.
    dataset: its name in the store.
    split: `train` or `val`.
    sampling: folder level, and what is recorded; uniform is one clip a video.
    annotation: label that becomes the `annotation`; all go to `labels`.
    batch_size: clips embedded at a time.
    mesh: devices to split a batch over; None uses one.

  Returns:
    The number of videos written.

  Raises:
    TypeError: the objective has no `embed`.
    ValueError: the pipeline has no such label or gives the wrong clips.
    StoreError: an embedding is not finite, or two videos are of one name.
  """
  _check_embeds(objective)
  names = tuple(pipeline.source.label_names)
  if annotation is not None and annotation not in names:
    raise ValueError(f'no label {annotation!r}; the data has {sorted(names)}')
  folder = store.split_folder(root, dataset, split, sampling)
  about: dict[int, VideoClips] = {}
  done: dict[int, list[np.ndarray]] = collections.defaultdict(list)
  batches = _clip_batches(pipeline, about, sampling, batch_size, mesh)
  written: dict[str, str] = {}
  for out in _rows(Held(objective), params, batches, mesh):
    for x, video in zip(out['x'], out['index'], strict=True):
      if video < 0:
        continue
      done[video].append(x)
      if len(done[video]) == len(about[video].spans):
        clips, info = np.stack(done.pop(video)), about.pop(video)
        entry = _entry(info, clips, sampling, annotation)
        if entry.id in written:
          raise store.StoreError(
            f'{pipeline.path}: {written[entry.id]} and {info.id} would both be '
            f'{entry.id} in {folder}; rename one'
          )
        written[entry.id] = info.id
        if jax.process_index() == 0:
          store.write(folder, entry)
  return len(written)


def _entry(info: VideoClips, clips, sampling, annotation) -> store.Embedding:
  spans = np.asarray(info.spans, float)
  return store.Embedding(
    id=store.file_id(_without_suffix(info.id)),
    clips=clips,
    annotation=None if annotation is None else info.labels[annotation],
    labels=info.labels,
    duration=info.duration,
    num_frames=info.num_frames,
    spans=spans.tolist(),
    fps=info.fps,
    clip_length=float(spans[0, 1] - spans[0, 0]),
    stride=float(spans[1, 0] - spans[0, 0]) if len(spans) > 1 else None,
    sampling=sampling,
  )


def _without_suffix(name: str) -> str:
  """Return the name that annotations know a video file by."""
  stem, suffix = os.path.splitext(name)
  return stem if suffix.lower() in VIDEO_SUFFIXES else name


def _clip_batches(
  pipeline, about, sampling, batch_size, mesh
) -> Iterator[Batch]:
  """Yield this process's rows of batches of clips; fill `about` as they go.

  Padding has index -1.
  """
  slot, slots = sharding.process_slot(mesh)
  if batch_size % slots:
    raise ValueError(
      f'batch_size {batch_size} does not divide by {slots} processes'
    )
  local = np.split(np.arange(batch_size), slots)[slot]

  def batch(rows):
    rows = rows + [(rows[0][0], -1, 0)] * (batch_size - len(rows))
    video, index, view = (
      np.stack([rows[i][k] for i in local]) for k in range(3)
    )
    return {
      'video': video,
      'index': index.astype(np.int32),
      'view': view.astype(np.int32),
      'valid': index >= 0,
      'row': local.astype(np.int32),
    }

  rows = []
  for info in pipeline.iterate_videos():
    if info.clips.ndim != 5 or (sampling == 'uniform' and len(info.clips) != 1):
      raise ValueError(
        f'{pipeline.path}: {sampling} embeddings take '
        f'{"one clip" if sampling == "uniform" else "clips"} of one crop, '
        f'found {list(info.clips.shape)} for {info.id}; change '
        f'{pipeline.path}.clip or .transform'
      )
    about[info.index] = info._replace(clips=None)
    for view, clip in enumerate(info.clips):
      rows.append((clip, info.index, view))
      if len(rows) == batch_size:
        yield batch(rows)
        rows = []
  if rows:
    yield batch(rows)


def _check_embeds(objective: Any) -> None:
  if not isinstance(objective, Embeds):
    raise TypeError(
      f'{type(objective).__name__} has no embed(params, batch); see Embeds in '
      'vfm_jax/objectives/base.py'
    )


def _rows(held, params, batches, mesh) -> Iterator[dict]:
  """Yield host results a batch, with a few batches under way."""
  queue = collections.deque()
  for number, batch in enumerate(batches):
    n = len(batch['video'])
    about = {
      'labels': dict(batch.get('labels', {})),
      'valid': np.asarray(batch.get('valid', np.ones(n, bool))),
      'index': np.asarray(
        batch.get('index', np.arange(number * n, number * n + n)), np.int32
      ),
      'view': np.asarray(batch.get('view', np.zeros(n)), np.int32),
    }
    queue.append(_send(held, params, {**batch, **about}, about, mesh))
    if len(queue) > _IN_FLIGHT:
      yield jax.tree.map(to_host, queue.popleft())
  for result in queue:
    yield jax.tree.map(to_host, result)


def _send(held, params, batch: Mapping, about: Mapping, mesh) -> dict:
  if mesh is None:
    return {**about, 'x': _embed(held, params, batch)}
  placed = sharding.put_batch(dict(batch), mesh)
  # What belongs to the rows travels with them: gathering over processes then
  # keeps them together.
  about = {k: placed[k] for k in about}
  return {**about, 'x': _embed(held, params, placed)}


@functools.partial(jax.jit, static_argnums=0)
def _embed(held, params, batch):
  return held.objective.embed(params, batch).astype(jnp.float32)
