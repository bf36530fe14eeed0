"""Train and score temporal action segmentation over an embedding store.

The offline protocol of the evaluation framework of TWLV-I (arXiv:2408.11318,
Table 7 and its repository): for each split a head is trained on the frozen
features of clips, and scored on the videos left out; numbers are means over
the splits.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from vfm_jax.evals import outcome as outcome_lib
from vfm_jax.evals import store, tas_metrics
from vfm_jax.evals.outcome import Outcome
from vfm_jax.evals.published import table
from vfm_jax.evals.report_data import Metric, Segment, Timeline
from vfm_jax.evals.stored import StoredSet
from vfm_jax.evals.tas_data import FrameLabels, LabelledVideo, Missing, runs
from vfm_jax.evals.tas_plots import strips
from vfm_jax.evals.tas_train import Training, predict
from vfm_jax.models.temporal_segmentation import Segmenter

# Columns of the report's table, by our measures.
_COLUMNS = {'f1_mean': 'mF1', 'edit': 'edit', 'accuracy': 'accuracy'}


@dataclasses.dataclass(frozen=True)
class Segmentation:
  """Segment the videos of a store; satisfies `StoredEvaluator`.

  Attributes:
    annotations: folder with `mapping.txt`, `groundTruth` and `splits`.
    head: network to train; its `num_classes` must be those of `mapping.txt`.
    training: how.
    splits: numbers of the splits.
    sampling: level of the store's layout; None where it has none.
    part: folder of the store that holds the features of all videos.
    sample_rate: every so many frames are labelled; a label is held over them.
    fps: frames a second of the annotations, for what is drawn.
    background: class whose segments count for nothing, where there is one.
    metrics: how segments are counted, see `evals.tas_metrics`.
    missing: what becomes of videos without features; 'skip' leaves them out
      as the released code does: they count as an edit score of 0.
    shown: test videos of a split that are drawn.
  """

  annotations: str
  head: Segmenter
  training: Training = Training()
  splits: tuple[int, ...] = (1,)
  sampling: store.Sampling | None = 'multi-clip'
  part: Literal['train', 'val'] = 'train'
  sample_rate: int = 1
  fps: float = 15.0
  background: str = 'background'
  metrics: tas_metrics.Protocol = 'exact'
  missing: Missing = 'error'
  shown: int = 3

  def __post_init__(self):
    if not self.splits or self.sample_rate < 1 or not self.fps > 0:
      raise ValueError(
        'expected at least one of splits, a sample_rate of 1 or more and a '
        f'positive fps, found {self.splits}, {self.sample_rate}, {self.fps}'
      )

  def metric_name(self, dataset: str, measure: str) -> str:
    """Return the name that carries the protocol."""
    sampling = [] if self.sampling is None else [self.sampling]
    how = [] if self.metrics == 'exact' else [self.metrics]
    head = f'asformer{self.training.epochs}ep'
    return '_'.join([dataset, *sampling, head, *how, measure])

  def run_stored(
    self, data: StoredSet, *, seed: int, mesh: Any = None
  ) -> Outcome:
    """Return accuracy, edit score and F1, the confusions and what to draw.

    Args:
      data: the set; its `<part>` holds `<video>_c.npy`.
      seed: of parameters, order and dropout.
      mesh: unused: one video a step does not split over devices.

    Raises:
      StoreError: features are missing or wrong; the message names the file.
      AnnotationError: as does this of an annotation.
      ValueError: the head has another number of classes.
    """
    del mesh
    labels = FrameLabels(self.annotations)
    classes = labels.classes
    if self.head.num_classes != len(classes):
      raise ValueError(
        f'head.num_classes={self.head.num_classes}: expected {len(classes)}, '
        f'the classes of {self.annotations}/mapping.txt'
      )
    background = None
    if self.background in classes:
      background = classes.index(self.background)
    folder = data.split(self.part, self.sampling).folder
    kept: dict[str, LabelledVideo] = {}
    splits, truths, predictions, drawn = [], [], [], []

    def load(part, number):
      listed = labels.split(part, number)
      videos = labels.load(
        listed,
        folder,
        sample_rate=self.sample_rate,
        missing=self.missing,
        kept=kept,
      )
      return videos, len(listed)

    for number in self.splits:
      train, _ = load('train', number)
      test, listed = load('test', number)
      params, _ = self.training.fit(self.head, train, seed=seed)
      scores = []
      for i, video in enumerate(test):
        predicted = predict(self.head, params, video.x)
        predicted = np.repeat(predicted, self.sample_rate)
        scores.append(
          tas_metrics.score_video(
            predicted, video.frames, background, self.metrics
          )
        )
        predicted = predicted[: len(video.frames)]
        truths.append(video.frames)
        predictions.append(predicted)
        if i < self.shown:
          drawn.append((video.id, video.frames, predicted, scores[-1]))
      splits.append(tas_metrics.score_split(scores, listed))

    name = data.dataset
    pictures = {}
    if drawn:
      pictures[name] = strips([d[:3] for d in drawn], classes, self.fps)
    return Outcome(
      metrics=self._metrics(name, splits),
      confusions=(
        outcome_lib.confusion(
          f'{name}, frames of the test videos',
          np.concatenate(truths),
          np.concatenate(predictions),
          classes,
        ),
      ),
      timelines=tuple(self._timeline(classes, *d) for d in drawn),
      pictures=pictures,
    )

  def _metrics(
    self, dataset: str, splits: Sequence[dict[str, float]]
  ) -> tuple[Metric, ...]:
    t, head = self.training, self.head
    protocol = (
      f'mean of {len(splits)} split(s); ASFormer head, {head.attend} attention'
      f' ({head.window} window), {t.epochs} epochs, lr {t.lr:g}; '
      f'{self.metrics} count of segments, missing videos: {self.missing}'
    )
    columns = table('tas').columns
    out = []
    for measure, value in tas_metrics.mean_over_splits(splits).items():
      column = f'{dataset} {_COLUMNS.get(measure, "")}'
      # The published numbers count segments as the released code does.
      published = self.metrics == 'released' and column in columns
      out.append(
        Metric(
          name=self.metric_name(dataset, measure),
          value=value / 100,
          protocol=protocol,
          task='tas',
          benchmark=column if published else None,
        )
      )
    return tuple(out)

  def _timeline(self, classes, video, truth, predicted, score) -> Timeline:
    one = tas_metrics.score_split([score])

    def segments(y):
      return tuple(Segment(a, b, name) for a, b, name in runs(y, classes, fps))

    fps = self.fps
    return Timeline(
      name=video,
      length=len(truth) / fps,
      truth=segments(truth),
      predicted=segments(predicted),
      note=f'accuracy {one["accuracy"]:.1f}, F1@50 {one["f1_50"]:.1f}',
    )
