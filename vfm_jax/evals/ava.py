"""Train a decoder on frozen tokens to find people and actions, as on AVA.

The settings are those of the TWLV-I report (arXiv:2408.11318, the part on
spatio-temporal action localisation), the decoder is a reconstruction: see
`models.star`. The metric is the official frame mAP at IoU 0.5.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from vfm_jax import optim, schedules, sharding
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.evals import ava_train
from vfm_jax.evals.ava_data import (
  Frame,
  FrameBoxes,
  frame_id,
  read_boxes,
  read_classes,
  read_excluded,
  write_boxes,
)
from vfm_jax.evals.ava_metrics import frame_map
from vfm_jax.evals.base import Held, Writes, to_host
from vfm_jax.evals.outcome import Outcome
from vfm_jax.evals.report_data import Metric
from vfm_jax.models.star import StarDecoder
from vfm_jax.objectives.base import EmbedsTokens, PyTree


@dataclasses.dataclass(frozen=True)
class Localisation(Writes):
  """Localise actions in space; satisfies `Evaluator` and `Detailed`.

  With a folder it writes the detections there, as `detections.csv` in the
  layout of the official script.

  Attributes:
    train: clips around key frames; the id of an example is
      `<video>,<timestamp>`, as that of `ava_data.KeyFrames`.
    val: the same, to be scored.
    train_csv: boxes of the training frames.
    val_csv: boxes of the frames that are scored.
    grid: (T, h, w) of the objective's tokens.
    label_map: .pbtxt of the classes that count (60 of AVA's 80); None counts
      all of the decoder's.
    excluded: csv of frames that are not scored, or None.
    decoder: network to train.
    weights: of the parts of the loss.
    batch_size: clips a step.
    epochs: passes over the training frames.
    warmup_epochs: passes over which the rate rises.
    lr: peak of AdamW (0.9, 0.999); it falls as a cosine, which is ours.
    weight_decay: decoupled.
    most: detections that are kept of a frame, the best; ours.
    name: of the data, part of the metric's.
  """

  train: Pipeline
  val: Pipeline
  train_csv: str
  val_csv: str
  grid: tuple[int, int, int]
  label_map: str | None = None
  excluded: str | None = None
  decoder: StarDecoder = StarDecoder()
  weights: ava_train.Weights = ava_train.Weights()
  batch_size: int = 256
  epochs: int = 50
  warmup_epochs: int = 10
  lr: float = 1e-4
  weight_decay: float = 1e-5
  most: int = 300
  name: str = 'ava'

  def __post_init__(self):
    if not 0 <= self.warmup_epochs < self.epochs or self.most < 1:
      raise ValueError(
        'expected warmup_epochs from 0 to below epochs, and most of 1 or more, '
        f'found {self.warmup_epochs}, {self.epochs} and {self.most}'
      )

  @property
  def metric_name(self) -> str:
    """Return the name that carries the protocol."""
    return f'{self.name}_star{self.epochs}ep_frame_map50'

  def run(
    self,
    objective: Any,
    params: PyTree,
    *,
    seed: int,
    mesh: jax.sharding.Mesh | None = None,
  ) -> dict[str, float]:
    """Return the frame mAP at IoU 0.5, a fraction; see `evaluate`."""
    return self.evaluate(objective, params, seed=seed, mesh=mesh).scalars

  def evaluate(
    self,
    objective: Any,
    params: PyTree,
    *,
    seed: int,
    mesh: jax.sharding.Mesh | None = None,
  ) -> Outcome:
    """Train a decoder and score it.

    Args:
      objective: one that satisfies `EmbedsTokens`; it stays as it is.
      params: its parameters.
      seed: of the decoder, the order of the clips and the dropout.
      mesh: devices to split a batch over; None uses one.

    Raises:
      TypeError: the objective gives no tokens.
      AnnotationError: a csv or the label map is wrong.
      ValueError: a frame of the pipelines has no boxes, or more people than
        the decoder has queries, or the grid is not that of the tokens.
    """
    if not isinstance(objective, EmbedsTokens):
      raise TypeError(
        f'{type(objective).__name__} has no tokens(params, batch); see '
        'EmbedsTokens in vfm_jax/objectives/base.py'
      )
    c = self.decoder.num_classes
    truth = read_boxes(self.val_csv, num_classes=c)
    classes = set(range(1, c + 1))
    if self.label_map is not None:
      classes = set(read_classes(self.label_map))
    excluded = read_excluded(self.excluded) if self.excluded else frozenset()
    held, decoder = self._fit(objective, params, seed, mesh)
    found = self._detect(held, params, decoder, mesh)
    value, each = frame_map(truth, found, classes, excluded=excluded)
    if (folder := self.made()) is not None:
      write_boxes(folder / 'detections.csv', found)
    metric = Metric(
      name=self.metric_name,
      value=value,
      protocol=(
        f'reconstructed STAR decoder, {self.decoder.depth} layers, '
        f'{self.decoder.queries} queries, {self.epochs} epochs, lr '
        f'{self.lr:g}; mean over {len(each)} classes, IoU 0.5'
      ),
      task='stal',
      benchmark='AVA' if self.name == 'ava' else None,
    )
    return Outcome(metrics=(metric,))

  def _fit(self, objective, params, seed, mesh) -> tuple[Held, PyTree]:
    """Return what is fixed, and the parameters of the trained decoder."""
    targets = self._targets()
    steps = self.train.num_examples // self.batch_size
    # A larger batch than there are clips is an error of the pipeline.
    total = max(self.epochs * steps, 1)
    index, count = sharding.process_slot(mesh)
    batches = self.train.train_batches(
      self.batch_size, seed=seed, process_index=index, process_count=count
    )
    init_key, key = jax.random.split(jax.random.key(seed))
    held = state = None
    with batches:
      for n in range(total):
        batch = next(batches)
        people = jax.tree.map(lambda x, at=batch['index']: x[at], targets)
        batch = {k: v for k, v in batch.items() if k != 'labels'}
        if mesh is not None:
          batch, people = (sharding.put_batch(x, mesh) for x in (batch, people))
        if held is None:
          decoder = ava_train.init(
            objective, self.decoder, self.grid, params, batch, init_key
          )
          tx, _ = self._optimizer(steps).build(decoder, total)
          state = decoder, tx.init(decoder)
          held = Held(
            ava_train.Plan(objective, self.decoder, self.grid, self.weights, tx)
          )
        state, value = ava_train.train_step(
          held, params, state, batch, people, key, n
        )
        if not n % max(steps, 1) and not np.isfinite(float(value)):
          raise ValueError(
            f'the loss of step {n} is {float(value)}; lower lr={self.lr:g}'
          )
    assert held is not None
    assert state is not None
    return held, state[0]

  def _optimizer(self, steps: int) -> optim.Optimizer:
    return optim.Optimizer(
      lr=functools.partial(
        schedules.warmup_cosine,
        peak=self.lr,
        warmup_steps=self.warmup_epochs * steps,
      ),
      weight_decay=self.weight_decay,
      method=functools.partial(optim.adam, b2=0.999),
    )

  def _targets(self) -> ava_train.Targets:
    """Return the people of every training frame, in the source's order.

    Rows of the same box are one person that does several things.
    """
    c = self.decoder.num_classes
    boxes = read_boxes(self.train_csv, num_classes=c)
    by_id = {frame_id(frame): found for frame, found in boxes.items()}
    people = []
    for i in range(self.train.num_examples):
      name = self.train.source[i].id
      if name not in by_id:
        raise ValueError(
          f'{self.train_csv}: no box of the frame {name}, which '
          f'{self.train.path}.source gives'
        )
      found = by_id[name]
      corners, owner = np.unique(found.boxes, axis=0, return_inverse=True)
      does = np.zeros((len(corners), c), np.float32)
      does[owner.reshape(-1), found.actions - 1] = 1.0
      people.append((corners, does))
    most = max(len(corners) for corners, _ in people)
    if most > self.decoder.queries:
      raise ValueError(
        f'decoder.queries={self.decoder.queries} must be at least {most}, the '
        f'people in a frame of {self.train_csv}'
      )
    n = len(people)
    out = ava_train.Targets(
      np.zeros((n, most, 4), np.float32),
      np.zeros((n, most, c), np.float32),
      np.zeros((n, most), bool),
    )
    for i, (corners, does) in enumerate(people):
      low, high = corners[:, :2], corners[:, 2:]
      k = len(corners)
      out.boxes[i, :k] = np.concatenate([(low + high) / 2, high - low], 1)
      out.actions[i, :k] = does
      out.present[i, :k] = True
    return out

  def _detect(self, held, params, decoder, mesh) -> dict[Frame, FrameBoxes]:
    """Return the best detections of every frame of `val`."""
    index, count = sharding.process_slot(mesh)
    batches = self.val.eval_batches(
      self.batch_size, process_index=index, process_count=count
    )
    out = {}
    with batches:
      for batch in batches:
        rows = {k: batch.pop(k) for k in ('index', 'valid')}
        batch = {k: v for k, v in batch.items() if k != 'labels'}
        if mesh is not None:
          batch, rows = (sharding.put_batch(x, mesh) for x in (batch, rows))
        boxes, scores = ava_train.detect(held, params, decoder, batch)
        boxes, scores, rows = jax.tree.map(to_host, (boxes, scores, rows))
        for i in np.flatnonzero(rows['valid']):
          name, second = self.val.source[int(rows['index'][i])].id.rsplit(
            ',', 1
          )
          out[name, int(second)] = _best(boxes[i], scores[i], self.most)
    return out


def _best(boxes: np.ndarray, scores: np.ndarray, most: int) -> FrameBoxes:
  """Return the best of boxes [S, 4] with scores [S, C], an action each."""
  order = np.argsort(-scores, axis=None, kind='stable')[:most]
  query, action = np.unravel_index(order, scores.shape)
  return FrameBoxes(
    boxes[query].astype(float), action + 1, scores[query, action].astype(float)
  )
