"""Train and score temporal action localisation over an embedding store.

The offline protocol of the evaluation framework of TWLV-I (arXiv:2408.11318,
section 4.5, Tables 7, 9 and 10, and its repository): a detector is trained on
the frozen features of clips. In the self-contained mode it names the classes;
otherwise it finds actions of any class, and scores of another classifier name
them.
"""

import dataclasses
import functools
import gzip
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from absl import logging

from vfm_jax.evals import store, tal_annotations, tal_map, tal_train
from vfm_jax.evals.outcome import Outcome
from vfm_jax.evals.published import table
from vfm_jax.evals.report_data import Metric, Segment, Timeline
from vfm_jax.evals.stored import StoredSet
from vfm_jax.evals.tal_annotations import Annotations, Instance
from vfm_jax.evals.tal_data import Item, Timing
from vfm_jax.evals.tal_decode import (
  Decoding,
  Proposals,
  fuse,
  read_class_scores,
  to_json,
)
from vfm_jax.evals.tal_map import Detections, Scores
from vfm_jax.evals.tal_plots import bars
from vfm_jax.evals.tal_train import HeadTraining
from vfm_jax.models.temporal_localization import Found, TemporalDetector

PyTree = Any
Results = Mapping[str, Proposals]

# Epochs after which the best one begins to be looked for.
_FROM_EPOCH = 6


@dataclasses.dataclass(frozen=True)
class Localization:
  """Find actions in the videos of a store; satisfies `StoredEvaluator`.

  Attributes:
    annotations: json in the layout of ActivityNet, see `tal_annotations`.
    detector: to train. Its `num_classes` is that of the annotations, or 1 with
      `external`.
    training: how.
    decoding: how actions are read off.
    timing: how the rows of the store lie in time.
    subsets: of the annotations to train and to score on; their features are in
      `train` and `val` of the store.
    overlaps: IoU from which a detection counts.
    external: file of class scores of each video, see `read_class_scores`; None
      is the self-contained mode.
    external_topk: classes that each segment gets from it.
    external_count: segments of a video that get them.
    sampling: level of the store's layout; None where it has none.
    prefix: of the file names, before the video ids of the annotations.
    duplicates: keep or drop repeated actions in training.
    invalid: see `tal_annotations.read_annotations`.
    missing: what becomes of videos without features: an error, or 'skip',
      which leaves them out of training and finds nothing in them.
    cut: see `tal_data.Item`.
    select: 'best' also reports the epoch with the best score on the videos
      that are scored, as the published numbers do: a choice on the test set.
    eval_batch: videos at a time when scored.
    cache: keep the features in memory.
    benchmark: first word of the report's columns; None if not comparable.
    shown: scored videos that are drawn.
  """

  annotations: str
  detector: TemporalDetector
  training: HeadTraining = HeadTraining()
  decoding: Decoding = Decoding()
  timing: Timing = Timing()
  subsets: tuple[str, str] = ('training', 'validation')
  overlaps: tuple[float, ...] = tal_map.THUMOS
  external: str | None = None
  external_topk: int = 2
  external_count: int = 200
  sampling: store.Sampling | None = 'multi-clip'
  prefix: str = ''
  duplicates: Literal['keep', 'drop'] = 'keep'
  invalid: Literal['error', 'drop'] = 'error'
  missing: Literal['error', 'skip'] = 'error'
  cut: bool = False
  select: Literal['last', 'best'] = 'last'
  eval_batch: int = 8
  cache: bool = True
  benchmark: Literal['THUMOS14', 'ANet'] | None = None
  shown: int = 3

  def __post_init__(self):
    if self.external is not None and self.detector.num_classes != 1:
      raise ValueError(
        'with external class scores the detector finds actions of any class: '
        f'expected detector.num_classes=1, found {self.detector.num_classes}'
      )
    fits = self.timing.resize in (None, self.training.length)
    if not fits or self.training.length % self.detector.divisor:
      raise ValueError(
        f'training.length={self.training.length}: expected a multiple of '
        f'{self.detector.divisor}, for the windows of the detector, and '
        f'timing.resize={self.timing.resize} where videos are stretched'
      )

  @property
  def mode(self) -> str:
    """Name of the mode."""
    return 'self-contained' if self.external is None else 'external'

  def metric_name(self, dataset: str, chosen: str, measure: str) -> str:
    """Return the name that carries the protocol."""
    sampling = [] if self.sampling is None else [self.sampling]
    head = f'actionformer{self.training.epochs}ep'
    return '_'.join([dataset, *sampling, head, self.mode, chosen, measure])

  def run_stored(
    self, data: StoredSet, *, seed: int, mesh: Any = None
  ) -> Outcome:
    """Return mAP, the detections as a file, and what to draw.

    Every file is read once before anything is trained.

    Args:
      data: the set; `train` and `val` hold `<prefix><video>_c.npy`.
      seed: of weights, order, crops and dropped branches.
      mesh: unused: batches are small.

    Raises:
      StoreError: annotations, features or class scores are missing or wrong;
        the message names the file.
      ValueError: the settings don't fit the annotations, or the loss is not
        finite.
    """
    del mesh
    annotations = tal_annotations.read_annotations(
      self.annotations, invalid=self.invalid
    )
    self._check_classes(annotations)
    truth = annotations.subset(self.subsets[1])
    train = self._items(data, annotations, 'train')
    val = self._items(data, annotations, 'val')
    _read_all([*train, *val])
    names = self._class_scores(val, annotations)

    best: tuple[float, int, PyTree] | None = None

    def after_epoch(epoch: int, params: PyTree) -> None:
      nonlocal best
      if self.select == 'best' and epoch >= _FROM_EPOCH:
        average = self._score(self._detect(params, val, names), truth).average
        if best is None or average > best[0]:
          best = average, epoch, jax.tree.map(np.asarray, params)

    params, _ = tal_train.fit(
      self.detector, self.training, train, seed=seed, after_epoch=after_epoch
    )
    found = self._detect(params, val, names)
    metrics = self._metrics(data.dataset, 'last', self._score(found, truth))
    if best is not None:
      found = self._detect(best[2], val, names)
      scores = self._score(found, truth)
      metrics += self._metrics(data.dataset, 'best', scores, best[1])
    shown = self._timelines(val, found, annotations)
    pictures = {data.dataset: bars(shown)} if shown else {}
    content = to_json(found, annotations.classes, data.dataset)
    return Outcome(
      metrics=metrics,
      timelines=shown,
      pictures=pictures,
      files={'detections.json.gz': gzip.compress(content, mtime=0)},
    )

  def _check_classes(self, annotations: Annotations) -> None:
    count = len(annotations.classes)
    if self.external is None and self.detector.num_classes != count:
      raise ValueError(
        f'detector.num_classes={self.detector.num_classes}: expected {count}, '
        f'the classes of {self.annotations}'
      )

  def _items(
    self,
    data: StoredSet,
    annotations: Annotations,
    split: Literal['train', 'val'],
  ) -> list[Item]:
    training = split == 'train'
    videos = annotations.subset(self.subsets[0 if training else 1])
    timing, reader = self.timing, data.split(split, self.sampling)
    if training:  # Longer ones are cropped.
      timing = dataclasses.replace(timing, max_steps=None)
    items = []
    for video, actions in videos.items():
      if training and self.duplicates == 'drop':
        actions = tal_annotations.without_duplicates(actions)
      item = Item(
        id=video,
        file=self.prefix + store.file_id(video),
        store=reader,
        actions=actions,
        timing=timing,
        duration=annotations.durations.get(video),
        cut=self.cut and training,
        classless=self.external is not None,
        cache=self.cache,
      )
      if item.path.is_file():
        items.append(item)
      elif self.missing == 'error':
        raise store.StoreError(
          f'{item.path}: no features of {video!r} of {self.annotations}; embed '
          "the video, or leave it out by missing='skip'"
        )
    if not items:
      raise store.StoreError(
        f'{reader.folder}: no features of any of the {len(videos)} videos of '
        f'the subset {self.subsets[0 if training else 1]!r}'
      )
    if skipped := len(videos) - len(items):
      logging.warning(
        '%s: no features of %d of %d videos',
        reader.folder,
        skipped,
        len(videos),
      )
    return items

  def _class_scores(
    self, val: Sequence[Item], annotations: Annotations
  ) -> Mapping[str, np.ndarray] | None:
    if self.external is None:
      return None
    scores = read_class_scores(self.external)
    count = len(annotations.classes)
    for item in val:
      if item.id not in scores or len(scores[item.id]) != count:
        found = len(scores[item.id]) if item.id in scores else 'none'
        raise store.StoreError(
          f'{self.external}: expected {count} class scores of {item.id!r}, '
          f'found {found}'
        )
    return scores

  def _detect(
    self,
    params: PyTree,
    items: Sequence[Item],
    names: Mapping[str, np.ndarray] | None,
  ) -> Results:
    """Return what is found in each video, in seconds."""
    out = {}
    t = self.training
    lengths: dict[int, list[Item]] = {}
    for item in items:
      steps = len(item.read().features)
      padded = tal_train.padded_length(steps, t.length, self.detector.divisor)
      lengths.setdefault(padded, []).append(item)
    for length, group in sorted(lengths.items()):
      for i in range(0, len(group), self.eval_batch):
        part = group[i : i + self.eval_batch]
        videos = [item.read() for item in part]
        # A last, smaller batch is filled up, to be compiled no second time.
        fill = [videos[0]] * (min(self.eval_batch, len(group)) - len(part))
        batch = tal_train.pad_batch([*videos, *fill], length)
        inputs = batch['features'], batch['mask']
        found = jax.device_get(_apply(self.detector, params, *inputs))
        for row, item in enumerate(part):
          out[item.id] = self._decode(item, found.video(row), names)
    return out

  def _decode(self, item: Item, found: Found, names) -> Proposals:
    kept = self.decoding.thin_out(self.decoding.read_off(found))
    grid, duration = item.about()
    seconds = grid.to_seconds(kept.segments, duration)
    kept = kept._replace(segments=seconds)
    if names is None:
      return kept
    return fuse(
      kept,
      names[item.id],
      topk=self.external_topk,
      count=self.external_count,
    )

  def _score(
    self, found: Results, truth: Mapping[str, Sequence[Instance]]
  ) -> Scores:
    counts = [len(x.scores) for x in found.values()]
    parts = zip(*found.values(), strict=True)
    joined = Detections(
      np.repeat(list(found), counts).tolist(),
      **dict(
        zip(
          ('segments', 'scores', 'labels'),
          map(np.concatenate, parts),
          strict=True,
        )
      ),
    )
    return tal_map.mean_average_precision(truth, joined, self.overlaps)

  def _metrics(
    self, dataset: str, chosen: str, scores: Scores, epoch: int | None = None
  ) -> tuple[Metric, ...]:
    t = self.training
    which = 'last epoch' if epoch is None else f'best epoch on test, {epoch}'
    protocol = (
      f'ActionFormer head, {self.mode}, {t.warmup_epochs} + {t.epochs} epochs, '
      f'lr {t.lr:g}, batch {t.batch}; {which}'
    )
    columns = table('tal').columns if epoch is not None else ()
    values = {'': scores.average}
    values |= {
      f'@{overlap:g}': value
      for overlap, value in zip(self.overlaps, scores.by_overlap, strict=True)
    }
    out = []
    for at, value in values.items():
      column = f'{self.benchmark} {self.mode}{at}'
      measure = f'map{round(100 * float(at[1:])):02d}' if at else 'map'
      out.append(
        Metric(
          name=self.metric_name(dataset, chosen, measure),
          value=float(value),
          protocol=protocol,
          task='tal',
          benchmark=column if column in columns else None,
        )
      )
    return tuple(out)

  def _timelines(
    self, items: Sequence[Item], found: Results, annotations: Annotations
  ) -> tuple[Timeline, ...]:
    """Return the truth and about as many of the best detections."""
    names, out = annotations.classes, []
    for item in items[: self.shown]:
      kept = found[item.id]
      best = np.argsort(-kept.scores, kind='stable')
      best = best[: max(3, len(item.actions))]
      out.append(
        Timeline(
          name=item.id,
          length=item.about()[1],
          truth=tuple(
            Segment(a.start, a.end, names[a.label])
            for a in item.actions
            if a.end > a.start
          ),
          predicted=tuple(
            Segment(float(start), float(end), names[label], float(score))
            for (start, end), score, label in zip(*kept.take(best), strict=True)
            if end > start
          ),
        )
      )
    return tuple(out)


def _read_all(items: Sequence[Item]) -> None:
  """Read every file once, so that a wrong one is told of before training."""
  width = None
  for item in items:
    own = item.read().features.shape[1]
    if width is not None and own != width:
      raise store.StoreError(
        f'{item.path}: {own} features, the videos before it have {width}'
      )
    width = own


@functools.partial(jax.jit, static_argnums=0)
def _apply(detector, params, features, mask):
  return detector.apply({'params': params}, features, mask)
