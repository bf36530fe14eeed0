"""Train a network of its own for each range of noise levels, as MEME does.

MEME (arXiv:2306.04990): N denoisers, which may differ in architecture, each
for one interval of the noise levels. Its code is not public; that the experts
share batches in equal parts and learn from the start at once is ours.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vfm_jax.objectives import base
from vfm_jax.objectives.denoise import Denoise
from vfm_jax.ops.intervals import Intervals, uniform
from vfm_jax.ops.process import bcast
from vfm_jax.ops.strata import SoftInterval, check_slices

# What must be said alike for all experts: they make one sample together.
_SHARED = ('process', 'data', 'label')


@dataclasses.dataclass(frozen=True)
class Experts:
  """Train N denoisers side by side, and draw from all of them as from one.

  In training each expert has its own part of the batch: of N, the one that
  `i % N` says for example i, so that no example moves between devices. Its
  times are those that its `times` draws: `ops.strata.SoftInterval` keeps them
  mostly to its interval. Each expert's loss is a task of its own.

  Where a sample is drawn or a loss is evaluated, the noise level decides: a
  sampler, all of whose samples are at one level, runs one expert a step. Where
  the levels of a batch differ, as with an adaptive solver that gives samples
  steps of their own, each expert that some sample needs runs on the whole
  batch, and each sample takes the output of its own.

  Attributes:
    experts: the objectives, the cleanest interval first. `process`, `data` and
      `label` are the same in all; `sampling` and `decoder` of the first one
      count.
    intervals: of the noise levels, one an expert; None for equal ones.
  """

  experts: tuple[Denoise, ...]
  intervals: Intervals | None = None

  def __post_init__(self):
    """Refuse experts that do not go together."""
    if len(self.experts) != self.ranges.count:
      raise ValueError(
        f'expected one of `objective.experts` for each of {self.ranges.count} '
        f'`objective.intervals`, found {len(self.experts)}'
      )
    for i, expert in enumerate(self.experts):
      self._check_shared(i, expert)
      times = expert.times
      if isinstance(times, SoftInterval) and (
        (times.interval, times.intervals) != (i, self.ranges)
      ):
        raise ValueError(
          f'expected `objective.experts.{i}.times` to be of interval {i} of '
          f'{self.ranges.bounds}, found interval {times.interval} of '
          f'{times.intervals.bounds}'
        )

  @property
  def ranges(self) -> Intervals:
    """Return the interval of each expert."""
    return self.intervals or uniform(max(len(self.experts), 1))

  @property
  def data(self) -> str:
    """Return the key of the batch that is learned."""
    return self.experts[0].data

  def init(
    self, rng: jax.Array, batch: base.Batch
  ) -> tuple[base.PyTree, base.PyTree]:
    """Return parameters and states by expert, {'expert_0', 'expert_1', ...}."""
    params, extra = {}, {}
    for i, expert in enumerate(self.experts):
      name = f'expert_{i}'
      params[name], extra[name] = expert.init(jax.random.fold_in(rng, i), batch)
    return params, extra

  def loss(
    self,
    params: base.PyTree,
    extra: base.PyTree,
    batch: base.Batch,
    rng: jax.Array,
    *,
    train: bool,
  ) -> base.LossOut:
    """Return the summed losses of the experts and their numbers of examples.

    In training the tasks are those of the experts one after the other, one an
    expert unless its `tasks` says otherwise, and metrics are `expert_{i}/...`.
    In evaluation the times are drawn as the process does, an example counts
    for the expert of its noise level, and metrics are those of `Denoise`.

    Args:
      params: from `init`.
      extra: from `init`.
      batch: as in `Denoise.loss`.
      rng: key of the step.
      train: as in `Denoise.loss`.

    Raises:
      ValueError: the experts do not share the batch equally.
    """
    if not train:
      return self._scored.loss(
        self._joined(params), {}, batch, rng, train=False
      ).replace(extra=extra)
    check_slices(len(batch['row']), self.ranges, 'objective.experts')
    outs = []
    for i, expert in enumerate(self.experts):
      part = jax.tree.map(functools.partial(_part, i, len(self.experts)), batch)
      name = f'expert_{i}'
      outs.append(expert.loss(params[name], extra[name], part, rng, train=True))
    return base.LossOut(
      sums=jnp.concatenate([out.sums for out in outs]),
      counts=jnp.concatenate([out.counts for out in outs]),
      aux=sum((out.aux for out in outs), start=jnp.zeros((), jnp.float32)),
      metrics={
        f'expert_{i}/{name}': value
        for i, out in enumerate(outs)
        for name, value in out.metrics.items()
      },
      extra={f'expert_{i}': out.extra for i, out in enumerate(outs)},
    )

  def after_update(
    self,
    extra: base.PyTree,
    params: base.PyTree,
    step: jax.Array,
    metrics: Mapping[str, jax.Array],
  ) -> base.PyTree:
    """Return `extra` after each expert has seen its own metrics."""
    out = {}
    for i, expert in enumerate(self.experts):
      name, prefix = f'expert_{i}', f'expert_{i}/'
      own = {
        key.removeprefix(prefix): value
        for key, value in metrics.items()
        if key.startswith(prefix)
      }
      out[name] = expert.after_update(extra[name], params[name], step, own)
    return out

  def denoise(
    self,
    params: base.PyTree,
    x: jax.Array,
    t: jax.Array,
    y: jax.Array | None = None,
  ) -> jax.Array:
    """Return what the expert of each noise level says; see `Denoise`."""
    return self._whole.denoise(self._joined(params), x, t, y)

  def draw(
    self,
    params: base.PyTree,
    keys: jax.Array,
    shape: tuple[int, ...],
    y: jax.Array | None = None,
  ) -> jax.Array:
    """Return samples f32 [B, *shape] in the space of the data."""
    return self._whole.draw(self._joined(params), keys, shape, y)

  def sample(
    self,
    params: base.PyTree,
    keys: jax.Array,
    shape: tuple[int, ...],
    y: jax.Array | None = None,
  ) -> jax.Array:
    """Return what `draw` does as pictures, uint8 [B, T, H, W, 3]."""
    return self._whole.sample(self._joined(params), keys, shape, y)

  def visualise(
    self,
    params: base.PyTree,
    extra: base.PyTree,
    batch: base.Batch,
    rng: jax.Array,
  ) -> dict[str, jax.Array]:
    """Return data and samples with the same labels; see `Denoise`."""
    return self._whole.visualise(self._joined(params), extra, batch, rng)

  def as_one(self, params: base.PyTree) -> tuple[Denoise, base.PyTree]:
    """Return the denoiser that all experts are together, and its parameters.

    It is for evaluation: its times are those of `process`, its task is one.
    """
    return self._whole, self._joined(params)

  def check(self, batch: base.Batch) -> None:
    """Refuse labels that a network has no row for; see `Denoise`."""
    for expert in self.experts:
      expert.check(batch)

  def check_labels(self, labels: Sequence[int] | None) -> list[int] | None:
    """Return the labels to draw; see `Denoise`."""
    return self._whole.check_labels(labels)

  def frozen(self) -> dict[str, base.PyTree]:
    """Return the weights of the decoder under 'decoder', if there are any."""
    return self._whole.frozen()

  @functools.cached_property
  def _whole(self) -> Denoise:
    """The first objective, with all networks for its own."""
    networks = tuple(expert.denoiser for expert in self.experts)
    together: Any = _ByLevel(networks, self.ranges)
    return dataclasses.replace(
      self.experts[0],
      denoiser=together,
      times=None,
      tasks=None,
      auxiliary=None,
    )

  @functools.cached_property
  def _scored(self) -> Denoise:
    """The same, with a task for each expert."""
    return dataclasses.replace(self._whole, tasks=self.ranges)

  def _joined(self, params):
    """Return the parameters of `_whole`, and its frozen weights if given."""
    networks = {
      name: params[name]['denoiser']
      for name in (f'expert_{i}' for i in range(len(self.experts)))
    }
    frozen = {k: v for k, v in params.items() if k == 'decoder'}
    return {'denoiser': networks, **frozen}

  def _check_shared(self, i, expert):
    first = self.experts[0]
    # Partials of one function differ, and read alike.
    differ = [
      name
      for name in _SHARED
      if repr(getattr(expert, name)) != repr(getattr(first, name))
    ]
    shapes = [
      (e.denoiser.channels, e.denoiser.out_channels) for e in (expert, first)
    ]
    rows = [
      (e.denoiser.num_classes, e.denoiser.null_label) for e in (expert, first)
    ]
    if expert.label is not None and rows[0] != rows[1]:
      raise ValueError(
        f'expected `objective.experts.{i}.denoiser` to have the labels of the '
        'first one, for they make one sample: found `num_classes` and the null '
        f'label (None with a `label_dropout` of 0) {rows[0]} and {rows[1]}'
      )
    if differ or shapes[0] != shapes[1]:
      raise ValueError(
        f'expected `objective.experts.{i}` to agree with the first one in '
        f'{_SHARED} and in the channels in and out of the denoiser, found a '
        f'difference in {differ or "the channels"} ({shapes[0]} and '
        f'{shapes[1]} channels)'
      )


@dataclasses.dataclass(frozen=True)
class _ByLevel:
  """Be the denoiser of all levels; as much of a module as `Denoise` uses.

  Attributes:
    networks: one an interval.
    intervals: of the noise levels.
  """

  networks: tuple[nn.Module, ...]
  intervals: Intervals

  @property
  def channels(self) -> int:
    return self._first.channels

  @property
  def num_classes(self) -> int:
    return self._first.num_classes

  @property
  def label_dropout(self) -> float:
    return self._first.label_dropout

  @property
  def null_label(self) -> int | None:
    return self._first.null_label

  @property
  def _first(self) -> Any:
    return self.networks[0]

  def apply(self, variables, x, t, y, *, tau, mutable=(), **kwargs):
    """Return f32 [B, ..., C_out], by the network of each tau, and no state."""
    del mutable
    owner = self.intervals.of(tau)
    out = jnp.zeros((*x.shape[:-1], self._first.out_channels), jnp.float32)
    for i, network in enumerate(self.networks):
      own = {'params': variables['params'][f'expert_{i}']}
      mine = owner == i

      def run(out, network=network, own=own, mine=mine):
        new: Any = network.apply(own, x, t, y, tau=tau, **kwargs)
        return jnp.where(bcast(mine, out), new.astype(jnp.float32), out)

      # A branch, and no selection, as long as nothing maps over the batch.
      out = jax.lax.cond(mine.any(), run, lambda out: out, out)
    return out, {}


def _part(i, count, x):
  """Return every `count`-th row of x from row i on."""
  return x.reshape(x.shape[0] // count, count, *x.shape[1:])[:, i]
