"""Learn to undo noise: diffusion and interpolants, with or without labels."""

import dataclasses
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from vfm_jax.nn.transformer import stack_sown
from vfm_jax.objectives import base
from vfm_jax.objectives.frozen import Decoder
from vfm_jax.ops.diffusion import Gaussian
from vfm_jax.ops.intervals import Intervals
from vfm_jax.ops.keys import fold
from vfm_jax.ops.process import NOISE_LEVELS, Process
from vfm_jax.ops.timesteps import Paced, Refuses, Reports, Times
from vfm_jax.sampling import Sampling

# Streams of an example's key.
_TIME, _NOISE, _LABEL, _HOOKS = range(4)


@dataclasses.dataclass(frozen=True)
class Denoise:
  """Corrupt a sample at a random time and learn what the process asks for.

  Attributes:
    denoiser: module (x, t, y, *, drop, tau, keys) -> output, see
      `models.dit.DiT`. Its `label_dropout` is how often a label is replaced by
      the null one in training; the draw is made here, for each example.
    process: how noise enters and what the output means: `ops.diffusion` or
      `ops.interpolants`.
    data: what to learn: a key of the batch, [B, H, W, C] or [B, T, H, W, C].
      Whole numbers are pixels, scaled to [-1, 1]; floats, such as latents, are
      taken as they are.
    label: which of the batch's labels conditions the network; None for none.
    times: how to draw the times of training, see `ops.timesteps`; None leaves
      it to the process. Its state is under 'times' in `extra`, and is updated
      with each microbatch and, where it is `Paced`, with each step.
    tasks: intervals of the noise level, each a task of its own, for
      `vfm_jax.multitask`; None is one task.
    auxiliary: scores what the network's hooks sow, and is added to the loss
      as it is, however the tasks are combined.
    bins: number of equal ranges of the noise level to report the loss of.
    sampling: how pictures during training and the `sample` verb are drawn.
    decoder: makes pictures of latents, see `latents.LatentDecoder`; None takes
      samples of 1 or 3 channels as pictures.
  """

  denoiser: nn.Module
  process: Process = Gaussian()
  data: str = 'image'
  label: str | None = 'label'
  times: Times | None = None
  tasks: Intervals | None = None
  auxiliary: base.Auxiliary | None = None
  bins: int = 4
  sampling: Sampling = Sampling()
  decoder: Decoder | None = None

  def __post_init__(self):
    """Refuse times that do not go with the process or the tasks."""
    if isinstance(self.times, Refuses):
      self.times.refuse(self.process, self.tasks)

  def init(
    self, rng: jax.Array, batch: base.Batch
  ) -> tuple[base.PyTree, base.PyTree]:
    """Return the parameters {'denoiser'} and the states of what has some.

    Raises:
      ValueError: the samples do not have the channels of the denoiser.
    """
    x = self.clean(batch)[:1]
    if x.shape[-1] != (channels := self.denoiser.channels):
      raise ValueError(
        f'expected batch[{self.data!r}] of {channels} channels '
        f'(`objective.denoiser.channels`), found shape {x.shape}; change it, '
        'or what `data.train` yields: the `source` and `shape` of a '
        'LatentPipeline'
      )
    zero = jnp.zeros((1,), jnp.int32)
    y = None if self._labels(batch) is None else zero
    time = zero.astype(jnp.float32)
    variables = self.denoiser.init(rng, x, time, y, tau=zero)
    extra = {} if self.times is None else {'times': self.times.init()}
    if isinstance(self.auxiliary, base.Holds):
      values = _Sown(stack_sown(variables.get('aux') or {}))
      extra['auxiliary'] = self.auxiliary.init(values)
    return {'denoiser': variables['params']}, extra

  def loss(
    self,
    params: base.PyTree,
    extra: base.PyTree,
    batch: base.Batch,
    rng: jax.Array,
    *,
    train: bool,
  ) -> base.LossOut:
    """Return the summed losses of each task's examples and their number.

    Metrics are `denoising`, the loss that the process gives, and the parts that
    it names, averaged over the examples; and `loss_bin{i}`, what the examples
    of a range of noise levels contribute: these add up to `denoising`, the
    cleanest range first.

    Args:
      params: from `init`.
      extra: from `init`.
      batch: the samples under `data`, `labels` of int32 [B], `row` int32 [B];
        `valid` bool [B] leaves examples out.
      rng: key of the step.
      train: whether labels are dropped, `times` used and updated, and the
        network's hooks given random keys.

    Raises:
      ValueError: `auxiliary` asks for what nothing sows.
    """
    x0, y = self.clean(batch), self._labels(batch)
    keys = base.example_keys(rng, batch)
    times = self.times if train else None
    if times is None:
      t, importance = self.process.draw_time(fold(keys, _TIME)), 1.0
    else:
      t, importance = times.draw(
        extra['times'], fold(keys, _TIME), self.process
      )
    eps = jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:]))(
      fold(keys, _NOISE)
    )
    drop = self._drop(fold(keys, _LABEL)) if train and y is not None else None
    x_t = self.process.corrupt(x0, eps, t)
    hook_keys = fold(keys, _HOOKS) if train else None
    collect = () if self.auxiliary is None else ('aux',)
    output, sown = self._apply(params, x_t, t, y, drop, hook_keys, collect)
    losses, parts = self.process.loss(output, x0, eps, x_t, t)
    if times is not None:
      seen = jax.lax.stop_gradient(losses)
      extra = {**extra, 'times': times.update(extra['times'], t, seen)}
    losses *= importance

    valid = batch.get('valid')
    weight = jnp.ones_like(losses) if valid is None else valid
    weight = weight.astype(jnp.float32)
    count = jnp.maximum(weight.sum(), 1.0)
    mean = lambda x: (x * weight).sum() / count  # noqa: E731
    metrics = {'denoising': mean(losses)}
    metrics |= {name: mean(part) for name, part in parts.items()}
    if isinstance(times, Reports):
      metrics |= times.report(extra['times'])
    level = self.process.noise_index(t)
    place = level * self.bins // NOISE_LEVELS
    for i in range(self.bins):
      metrics[f'loss_bin{i}'] = mean(losses * (place == i))
    aux = jnp.zeros((), jnp.float32)
    if self.auxiliary is not None:
      values, held = _Sown(stack_sown(sown)), {}
      if train and isinstance(self.auxiliary, base.Holds):
        state = self.auxiliary.refresh(extra['auxiliary'], values, level)
        extra, held = {**extra, 'auxiliary': state}, {'state': state}
      aux, named = self.auxiliary(values, level, weight, **held)
      metrics |= named
    members = self._members(level) * weight
    return base.LossOut(
      sums=(members * losses).sum(axis=1),
      counts=members.sum(axis=1),
      aux=aux,
      metrics=metrics,
      extra=extra,
    )

  def after_update(
    self,
    extra: base.PyTree,
    params: base.PyTree,
    step: jax.Array,
    metrics: Mapping[str, jax.Array],
  ) -> base.PyTree:
    """Return `extra` with `times` told the mean loss of the whole step."""
    del params, step
    if isinstance(self.times, Paced):
      times = self.times.pace(extra['times'], metrics['denoising'])
      extra = {**extra, 'times': times}
    if isinstance(self.auxiliary, base.Holds):
      state = self.auxiliary.after_update(extra['auxiliary'])
      extra = {**extra, 'auxiliary': state}
    return extra

  def denoise(
    self,
    params: base.PyTree,
    x: jax.Array,
    t: jax.Array,
    y: jax.Array | None = None,
  ) -> jax.Array:
    """Return the output f32 [B, ..., C_out] of the network.

    Args:
      params: from `init`, or an average of them.
      x: f32 [B, ..., C] noisy samples.
      t: [B] times of `process`.
      y: int32 [B] labels; None for the network's null label, or where it
        knows no labels.
    """
    return self._apply(params, x, t, y)[0]

  def draw(
    self,
    params: base.PyTree,
    keys: jax.Array,
    shape: tuple[int, ...],
    y: jax.Array | None = None,
  ) -> jax.Array:
    """Return samples f32 [B, *shape] in the space of the data.

    Args:
      params: from `init`, or an average of them.
      keys: one key a sample [B].
      shape: of one sample.
      y: int32 [B] labels; None where `label` is None.
    """
    return self.sampling.draw(
      lambda x, t, y: self.denoise(params, x, t, y),
      self.process,
      keys,
      shape,
      y,
      self.denoiser.null_label,
    )

  def clean(self, batch: base.Batch) -> jax.Array:
    """Return the samples x0 of a batch, f32 [B, ..., C].

    Raises:
      ValueError: the batch has none under `data`.
    """
    x = batch.get(self.data)
    if x is None or x.ndim not in (4, 5):
      found = {
        k: tuple(v.shape) for k, v in batch.items() if hasattr(v, 'ndim')
      }
      raise ValueError(
        f'expected batch[{self.data!r}] [B, H, W, C] or [B, T, H, W, C], found '
        f'{found}; change `objective.data` or what `data` yields'
      )
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.floating):
      return x.astype(jnp.float32)
    return x.astype(jnp.float32) / 127.5 - 1.0

  def check(self, batch: base.Batch) -> None:
    """Refuse labels that the network has no row for.

    Raises:
      ValueError: names the label and the examples.
    """
    if self.label is None or self.label not in batch['labels']:
      return
    y = np.asarray(batch['labels'][self.label])
    bad = (y < 0) | (y >= self.denoiser.num_classes)
    if bad.any():
      raise ValueError(
        f'expected {self.label!r} from 0 to {self.denoiser.num_classes - 1} '
        '(`objective.denoiser.num_classes`), found '
        f'{np.unique(y[bad]).tolist()} in the examples '
        f'{batch["index"][bad][:5].tolist()} of `data.train`'
      )

  def check_labels(self, labels: Sequence[int] | None) -> list[int] | None:
    """Return the labels to draw: those given, or by default all there are.

    Raises:
      ValueError: one is not a label of the network.
    """
    if self.label is None:
      if labels:
        raise ValueError(
          '`objective.label` is None: expected no labels to draw, found '
          f'{list(labels)}'
        )
      return None
    classes = self.denoiser.num_classes
    if bad := [y for y in labels or () if not 0 <= y < classes]:
      raise ValueError(
        f'expected labels from 0 to {classes - 1} '
        f'(`objective.denoiser.num_classes`), found {bad}'
      )
    return list(labels or range(classes))

  def sample(
    self,
    params: base.PyTree,
    keys: jax.Array,
    shape: tuple[int, ...],
    y: jax.Array | None = None,
  ) -> jax.Array:
    """Return what `draw` does as pictures, uint8 [B, T, H, W, 3].

    Args:
      params: as in `draw`, and from `objectives.frozen.with_frozen` where there
        is a decoder.
      keys: as in `draw`, and so the others.
      shape: of one sample.
      y: labels.

    Raises:
      ValueError: samples are latents, and there is nothing to decode them.
    """
    if not self._drawable(params):
      raise ValueError(
        'samples of '
        f'{shape[-1]} channels are latents: to see them, set '
        '`objective.decoder` to ref(LatentDecoder, path=DIR), with the folder '
        f'of their autoencoder; found {self.decoder}'
      )
    return self._pictures(params, self.draw(params, keys, shape, y))

  def frozen(self) -> dict[str, base.PyTree]:
    """Return the weights of the decoder under 'decoder', if there are any."""
    weights = None if self.decoder is None else self.decoder.weights()
    return {} if weights is None else {'decoder': weights}

  def visualise(
    self,
    params: base.PyTree,
    extra: base.PyTree,
    batch: base.Batch,
    rng: jax.Array,
  ) -> dict[str, jax.Array]:
    """Return uint8 [B, T, H, W, 3]: data, and samples with the same labels.

    Latents that nothing decodes give no pictures, {}, and a warning.
    """
    del extra
    if not self._drawable(params):
      logging.warning(
        'No pictures: latents need `objective.decoder` with a path, found %s',
        self.decoder,
      )
      return {}
    x = self.clean(batch)
    keys = base.example_keys(rng, batch)
    return {
      'data': self._pictures(params, x),
      'sample': self.sample(params, keys, x.shape[1:], self._labels(batch)),
    }

  def _apply(self, params, x, t, y, drop=None, keys=None, collect=()):
    """Return the output and the collections that are collected."""
    output, sown = self.denoiser.apply(
      {'params': params['denoiser']},
      x,
      self.process.model_time(t),
      y,
      drop=drop,
      tau=self.process.noise_index(t),
      keys=keys,
      mutable=list(collect),
    )
    return output.astype(jnp.float32), sown

  def _members(self, level):
    """Return f32 [K, B]: 1 where an example belongs to a task."""
    if self.tasks is None:
      return jnp.ones((1, len(level)), jnp.float32)
    return jax.nn.one_hot(self.tasks.of(level), self.tasks.count, axis=0)

  def _drop(self, keys):
    """Return which labels to replace by the null one [B], or None for none."""
    rate = self.denoiser.label_dropout
    if not rate:
      return None
    return jax.vmap(lambda key: jax.random.uniform(key) < rate)(keys)

  def _labels(self, batch):
    if self.label is None:
      return None
    labels = batch.get('labels', {})
    if self.label not in labels:
      raise ValueError(
        f'expected a label {self.label!r}, found {sorted(labels)}; change '
        '`objective.label` (None learns without labels) or what `data` yields'
      )
    return jnp.asarray(labels[self.label])

  def _drawable(self, params):
    if 'decoder' in params:
      return True
    return self.decoder is None and self.denoiser.channels in (1, 3)

  def _pictures(self, params, x):
    """Return samples [B, (T,) H, W, C] as uint8 [B, T, H, W, 3]."""
    if self.decoder is not None:
      x = self.decoder.decode(params['decoder'], x)
    x = x if x.ndim == 5 else x[:, None]
    x = jnp.round(127.5 * (jnp.clip(x, -1.0, 1.0) + 1.0)).astype(jnp.uint8)
    return jnp.broadcast_to(x, (*x.shape[:-1], 3))


class _Sown(dict[str, jax.Array]):
  """What the network sowed, by name; asking for more is an error."""

  def __missing__(self, name):
    raise ValueError(
      f'`objective.auxiliary` needs {name!r}, which nothing in the network '
      f'sows, found {sorted(self)}; change it or `objective.denoiser.hooks`'
    )
