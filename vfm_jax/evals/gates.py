"""Draw which channels or experts serve which noise level, and what is shared.

The columns of a network are the channels that DTR masks, or the experts of all
layers of Switch-DiT. The affinity of two levels is the share of the columns of
one that the other uses too; the measure is ours.
"""

import dataclasses
import functools
import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from vfm_jax.evals.base import Held, Writes, to_host
from vfm_jax.models import routing, switch
from vfm_jax.nn.transformer import stack_sown
from vfm_jax.objectives.base import PyTree
from vfm_jax.ops.process import NOISE_LEVELS
from vfm_jax.plots import save_figure

# Distance of the levels whose affinity is reported.
_LAG = 100


class Usage(NamedTuple):
  """Hold what each noise level uses.

  Attributes:
    weight: f32 [L, T, C], the gates, or the masks. Masks that are the same in
      all layers are there once.
    used: bool [L, T, C], the columns that are active.
  """

  weight: np.ndarray
  used: np.ndarray

  @property
  def affinity(self) -> np.ndarray:
    """Return the share of columns in common, f32 [T, T]."""
    used = np.moveaxis(self.used, 1, 0).reshape(self.used.shape[1], -1)
    used = used.astype(np.float32)
    return used @ used.T / used.sum(1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Gates(Writes):
  """Measure and draw the routing of a denoiser; satisfies `Evaluator`.

  It writes `routing.png`.

  Attributes:
    folder: see `Writes`.
  """

  def run(
    self,
    objective: Any,
    params: PyTree,
    *,
    seed: int,
    mesh: jax.sharding.Mesh | None = None,
  ) -> dict[str, float]:
    """Return what the routing is like.

    `unused` and `always` count the columns that no level and that every level
    uses, `affinity_lag100` is the mean affinity of levels 100 apart, and
    `gate_entropy`, where there are gates, their mean entropy over the largest
    that there could be.

    Args:
      objective: with a `denoiser` that is routed.
      params: its parameters, or an average of them.
      seed: not used: nothing is drawn at random.
      mesh: not used: parameters may lie on any.

    Raises:
      ValueError: the denoiser is not routed.
    """
    del seed, mesh
    usage = find_usage(objective, params)
    affinity = usage.affinity
    out = {
      'unused': float((~usage.used).all(1).sum()),
      'always': float(usage.used.all(1).sum()),
      f'affinity_lag{_LAG}': float(np.diagonal(affinity, _LAG).mean()),
    }
    experts = usage.weight.shape[-1]
    if not isinstance(objective.denoiser.hooks.mask, routing.Routes):
      p = np.maximum(usage.weight, 1e-30)
      entropy = -(p * np.log(p)).sum(-1).mean()
      out['gate_entropy'] = float(entropy / np.log(max(experts, 2)))
    if folder := self.made():
      draw(usage, affinity, folder / 'routing.png')
    return out


def find_usage(objective: Any, params: PyTree) -> Usage:
  """Return what each noise level uses in the denoiser of an objective.

  Args:
    objective: has a `denoiser`, a `models.dit.DiT` with routing hooks.
    params: {'denoiser'}.

  Raises:
    ValueError: there is no routing.
  """
  model = getattr(objective, 'denoiser', None)
  mask = None if model is None else model.hooks.mask
  if model is not None and isinstance(mask, routing.Routes):
    layers = range(model.dims.depth)
    masks = np.stack([mask.table(model.dims.width, i) for i in layers])
    masks = masks[:1] if (masks == masks[:1]).all() else masks
    return Usage(masks.astype(np.float32), masks)
  if not isinstance(mask, switch.Experts):
    raise ValueError(
      'expected `objective.denoiser.hooks.mask` of models.routing or '
      f'models.switch to draw the routing of, found {mask}'
    )
  found = _gates(Held(objective), params['denoiser'])
  weight, top = (to_host(found[k]) for k in (switch.LEVELS, switch.TOP))
  used = (top[..., None] == np.arange(mask.count)).any(-2)
  return Usage(weight, used)


@functools.partial(jax.jit, static_argnums=0)
def _gates(held, params):
  """Return what the gates sow; the compiler drops all else."""
  model = held.objective.denoiser
  frames, height, width = (
    n * p for n, p in zip(model.built_grid, model.patch_shape, strict=True)
  )
  x = jnp.zeros((1, frames, height, width, model.channels))
  zero = jnp.zeros(1, jnp.int32)
  y = zero if model.num_classes else None
  _, sown = model.apply(
    {'params': params},
    x,
    zero.astype(jnp.float32),
    y,
    tau=zero,
    mutable=['aux'],
  )
  return stack_sown(sown['aux'])


def draw(
  usage: Usage, affinity: np.ndarray, out: str | os.PathLike
) -> pathlib.Path:
  """Draw the columns that each level uses, and the affinity of levels.

  Args:
    usage: L layers of C columns.
    affinity: f32 [T, T].
    out: file to write, a PNG.
  """
  layers, _, count = usage.weight.shape
  shown = np.where(usage.used, usage.weight, 0.0)
  rows = np.moveaxis(shown, 2, 1).reshape(layers * count, -1)
  figure = Figure(figsize=(12, 5), dpi=110, facecolor='white')
  left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
  unit = 'expert' if layers > 1 else 'channel'
  for axis, image, title, label, aspect in (
    (left, rows, f'active {unit}s', unit, 'auto'),
    (right, affinity, 'shared by two levels', 'noise level', 'equal'),
  ):
    seen = axis.imshow(
      image,
      origin='lower',
      aspect=aspect,
      vmin=0,
      vmax=1,
      cmap='viridis',
      interpolation='nearest',
      extent=(0, NOISE_LEVELS, 0, len(image)),
    )
    axis.set_title(title, loc='left', fontsize=10)
    axis.set_xlabel('noise level (0 is clean)', fontsize=9)
    axis.set_ylabel(label, fontsize=9)
    figure.colorbar(seen, ax=axis, fraction=0.04)
  if 1 < layers <= 64:
    left.hlines(np.arange(1, layers) * count, 0, NOISE_LEVELS, 'w', lw=0.4)
  figure.tight_layout()
  return save_figure(figure, out)
