"""Train classifiers on a frozen encoder, a grid of settings at once.

The encoder sees each batch once; copies of the head, one for each pair of
learning rate and weight decay, learn from it under one `jax.vmap`. All copies
start from the same weights and see the same batches.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from vfm_jax import optim, schedules, sharding
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.data.video import BadVideo
from vfm_jax.evals import head_steps
from vfm_jax.evals.base import Held, to_host
from vfm_jax.evals.head_steps import Reads
from vfm_jax.objectives.base import Batch, Embeds, EmbedsTokens, PyTree


@dataclasses.dataclass(frozen=True)
class Training:
  """Say how the heads learn.

  The rate warms up linearly, then follows a cosine to 0.

  Attributes:
    lrs: peak learning rates of the grid.
    wds: weight decays of the grid; matrices decay, other parameters don't.
    epochs: passes over the training videos.
    warmup_epochs: passes over which the rate rises.
    batch: clips a step; the last, partial batch of a pass is dropped.
    fit_batch: take min(batch, number of training videos) as the batch.
    method: `optim.adam`, `sgd`, `lars` or a bind of one.
    clip_norm: bound on the norm of each copy's gradient; None: off.
    cache: encode the clips of `train.eval_batches` once and learn from those,
      in memory. Without it the encoder is in the loop, and the clips are
      drawn and augmented anew in each pass.
  """

  lrs: tuple[float, ...]
  wds: tuple[float, ...] = (0.0,)
  epochs: int = 20
  warmup_epochs: int = 0
  batch: int = 256
  fit_batch: bool = False
  method: Callable = optim.adam
  clip_norm: float | None = None
  cache: bool = False

  def __post_init__(self):
    if not self.lrs or not self.wds:
      raise ValueError(
        'training.lrs and training.wds need a value each, found '
        f'{self.lrs} and {self.wds}'
      )
    if self.batch < 1 or not 0 <= self.warmup_epochs < self.epochs:
      raise ValueError(
        'training: expected batch >= 1 and 0 <= warmup_epochs < epochs, found '
        f'batch={self.batch}, warmup_epochs={self.warmup_epochs}, '
        f'epochs={self.epochs}'
      )

  @property
  def grid(self) -> tuple[tuple[float, float], ...]:
    """All pairs (learning rate, weight decay)."""
    return tuple(itertools.product(self.lrs, self.wds))

  def batch_of(self, n: int) -> int:
    """Return the batch size on n videos.

    Raises:
      ValueError: it is more than there are.
    """
    batch = min(self.batch, n) if self.fit_batch else self.batch
    if batch > n:
      raise ValueError(
        f'training.batch={self.batch} is larger than the {n} training videos; '
        f'set it to {n} or less, or training.fit_batch=True'
      )
    return batch

  def schedule(self, n: int) -> np.ndarray:
    """Return the rate of every step on n videos over its peak, f64 [steps]."""
    steps = n // self.batch_of(n)
    total = self.epochs * steps
    return schedules.warmup_cosine(
      np.arange(total),
      total,
      peak=1.0,
      warmup_steps=self.warmup_epochs * steps,
      ramp=schedules.early_ramp,
    )


class Trained(NamedTuple):
  """Hold what the heads of one label came to.

  Attributes:
    probabilities: f32 [G, n, C] of each copy, the mean over a video's views.
    y: int32 [n] classes.
    losses: f32 [steps, G] cross entropy of each batch before its update.
    params: of the heads, with a leading axis [G].
  """

  probabilities: np.ndarray
  y: np.ndarray
  losses: np.ndarray
  params: PyTree

  @property
  def top1(self) -> np.ndarray:
    """Fraction of videos that each copy gets right, f64 [G].

    A copy that diverged has none.
    """
    fine = np.isfinite(self.probabilities).all((1, 2))
    right = self.probabilities.argmax(-1) == self.y
    return np.where(fine, right.mean(-1), 0.0)


def train_heads(
  objective: Any,
  params: PyTree,
  make: Callable[[int], nn.Module],
  train: Pipeline,
  val: Pipeline,
  labels: tuple[str, ...],
  training: Training,
  *,
  reads: Reads,
  eval_batch: int,
  seed: int,
  mesh: jax.sharding.Mesh | None = None,
) -> dict[str, Trained]:
  """Train the grid on each label and evaluate it.

  Args:
    objective: frozen; one that satisfies `Embeds` or `EmbedsTokens`.
    params: its parameters.
    make: number of classes -> head.
    train: clips to learn from.
    val: clips to evaluate on; the views of a video are averaged, as
      probabilities.
    labels: names in `batch['labels']`, each with heads of its own.
    training: how they learn.
    reads: what a head reads.
    eval_batch: clips encoded at a time in evaluations.
    seed: of initial weights, order and augmentation.
    mesh: devices to split batches over; None uses one.

  Raises:
    TypeError: the objective gives no embeddings or tokens.
    ValueError: a label is missing or out of range, there is no full batch, or
      all copies diverged.
  """
  protocol = Embeds if reads == 'embed' else EmbedsTokens
  if not isinstance(objective, protocol):
    raise TypeError(
      f'{type(objective).__name__} has no {reads}(params, batch); see '
      f'{protocol.__name__} in vfm_jax/objectives/base.py'
    )
  classes = {k: _class_count(k, train, val) for k in labels}
  rates = training.schedule(train.num_examples)
  encode = functools.partial(head_steps.encode, Held(objective), reads, params)
  where = None if mesh is None else sharding.replicated(mesh)
  plan = head_steps.Plan(
    tuple((k, make(n)) for k, n in classes.items()),
    training.method,
    training.clip_norm,
    where,
  )
  lrs, wds = np.array(training.grid, np.float32).T
  batches = _training_batches(encode, train, training, eval_batch, seed, mesh)
  state, losses = None, []
  for x, y in itertools.islice(batches, len(rates)):
    y = {k: y[k] for k in labels}
    if state is None:
      state = head_steps.first_state(plan, len(training.grid), seed, x)
    rate = np.float32(rates[len(losses)])
    state, loss = head_steps.step(plan, state, x, y, rate * lrs, wds)
    losses.append(loss)
  assert state is not None
  heads = state[0]
  out = _evaluate(
    functools.partial(head_steps.probabilities, plan, heads),
    encode,
    _batches(val, eval_batch, mesh),
    labels,
  )
  history = {k: np.stack([to_host(x[k]) for x in losses]) for k in labels}
  result = {
    k: Trained(*out[k], history[k], jax.tree.map(to_host, heads[k]))
    for k in labels
  }
  for k, found in result.items():
    if not np.isfinite(found.probabilities).all((1, 2)).any():
      raise ValueError(
        f'all {len(training.grid)} heads of the label {k!r} diverged; lower '
        f'training.lrs, found {training.lrs}'
      )
  return result


def _class_count(label: str, *pipelines: Pipeline) -> int:
  """Return the smallest class count that holds every label of the sources."""
  seen = []
  for pipeline in pipelines:
    source = pipeline.source
    if label not in source.label_names:
      raise ValueError(
        f'no label {label!r} in {pipeline.path}.source; it has '
        f'{sorted(source.label_names)}'
      )
    for i in range(len(source)):
      try:
        example = source[i]
      except BadVideo:
        continue
      if example.labels[label] < 0:
        raise ValueError(
          f'{example.id}: the label {label!r} must be 0 or more, found '
          f'{example.labels[label]}'
        )
      seen.append(example.labels[label])
  return 1 + int(max(seen, default=0))


def _training_batches(
  encode: Callable, train: Pipeline, training: Training, eval_batch, seed, mesh
) -> Iterator[tuple[Any, Mapping[str, Any]]]:
  """Yield features and labels of training batches without end."""
  batch = training.batch_of(train.num_examples)
  if not training.cache:
    slot, slots = sharding.process_slot(mesh)
    source = train.train_batches(
      batch, seed=seed, process_index=slot, process_count=slots
    )
    for item in source:
      item = item if mesh is None else sharding.put_batch(dict(item), mesh)
      yield encode(item), item['labels']
  xs, ys = [], []
  for item in _batches(train, eval_batch, mesh):
    keep = to_host(item['valid'])
    xs.append(to_host(encode(item))[keep])
    ys.append({k: to_host(v)[keep] for k, v in item['labels'].items()})
  x = np.concatenate(xs)
  y = {k: np.concatenate([part[k] for part in ys]) for k in ys[0]}
  if len(x) < batch:
    raise ValueError(
      f'training.batch={batch}: only {len(x)} clips of {train.path}.source are '
      'usable'
    )
  rng = np.random.default_rng(seed)
  while True:
    order = rng.permutation(len(x))
    for start in range(0, len(x) - batch + 1, batch):
      at = order[start : start + batch]
      chosen = x[at], {k: v[at] for k, v in y.items()}
      if mesh is not None:
        chosen = jax.device_put(chosen, sharding.replicated(mesh))
      yield chosen


def _batches(pipeline: Pipeline, size: int, mesh) -> Iterator[Batch]:
  slot, slots = sharding.process_slot(mesh)
  for item in pipeline.eval_batches(
    size, process_index=slot, process_count=slots
  ):
    yield item if mesh is None else sharding.put_batch(dict(item), mesh)


def _evaluate(
  classify: Callable,
  encode: Callable,
  batches: Iterable[Batch],
  labels: tuple[str, ...],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Return mean probabilities [G, n, C] and classes [n] by label."""
  index, ys, ps = [], [], []
  for item in batches:
    found = classify(encode(item))
    keep = to_host(item['valid'])
    index.append(to_host(item['index'])[keep])
    ys.append({k: to_host(item['labels'][k])[keep] for k in labels})
    ps.append({k: to_host(found[k])[:, keep] for k in labels})
  _, first, video = np.unique(
    np.concatenate(index), return_index=True, return_inverse=True
  )
  if not len(first):
    raise ValueError('no valid clip to evaluate on: none of the data is usable')
  counts = np.bincount(video)
  out = {}
  for k in labels:
    p = np.concatenate([part[k] for part in ps], axis=1)
    sums = np.zeros((len(p), len(first), p.shape[2]), np.float32)
    np.add.at(sums.swapaxes(0, 1), video, p.swapaxes(0, 1))
    y = np.concatenate([part[k] for part in ys])[first]
    out[k] = sums / counts[:, None], y
  return out
