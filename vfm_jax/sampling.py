"""Say how samples are drawn: a sampler, and how labels steer it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from vfm_jax import guidance, samplers
from vfm_jax.ops.process import Process


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Draw samples from a denoiser.

  Attributes:
    sampler: (denoise, process, x, keys) -> samples; a function of `samplers`
      for Gaussian diffusion, of `solvers` for interpolants.
    scale: of classifier-free guidance; 1 follows the labels and no more.
    channels: leading channels that are guided, see `guidance.cfg`.
    interval: times at which to guide, see `guidance.cfg`.
  """

  sampler: Callable = samplers.ddim
  scale: float = 1.0
  channels: int | None = None
  interval: tuple[float, float] | None = None

  def draw(
    self,
    denoise: Callable[..., jax.Array],
    process: Process,
    keys: jax.Array,
    shape: tuple[int, ...],
    y: jax.Array | None,
    null_label: int | None,
  ) -> jax.Array:
    """Return samples f32 [B, *shape].

    Args:
      denoise: (x, t, y) -> output.
      process: that the denoiser was trained with.
      keys: one key a sample [B]; a sample depends on its own key and label
        alone.
      shape: of one sample.
      y: int32 [B] labels; None where the denoiser takes none.
      null_label: the label that stands for none, or None without one.

    Raises:
      ValueError: guidance without labels or without a null label, or a sampler
        that is annotated for another process.
    """
    self._check(process)
    x = samplers.initial_noise(keys, shape)
    if self.scale == 1.0:
      return self.sampler(lambda x, t: denoise(x, t, y), process, x, keys)
    if y is None or null_label is None:
      raise ValueError(
        'guidance needs labels and a null label: expected '
        '`objective.sampling.scale` 1, or `objective.label` and '
        '`objective.denoiser.label_dropout` above 0; found the scale '
        f'{self.scale:g}'
      )
    guided = guidance.cfg(
      denoise,
      y,
      self.scale,
      null_label,
      channels=self.channels,
      interval=self.interval,
    )
    return self.sampler(guided, process, x, keys)

  def _check(self, process):
    function: Any = self.sampler
    while isinstance(function, functools.partial):
      function = function.func
    kind = getattr(function, '__annotations__', {}).get('process')
    if isinstance(kind, type) and not isinstance(process, kind):
      raise ValueError(
        f'`objective.sampling.sampler` {function.__name__} samples from '
        f'{kind.__name__}, found the `objective.process` '
        f'{type(process).__name__}; take one of `samplers` for Gaussian and of '
        '`solvers` for Interpolant'
      )
