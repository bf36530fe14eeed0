"""Draw what an objective sees and predicts, next to the clips themselves."""

import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import numpy as np

from vfm_jax import plots
from vfm_jax.evals.base import Held, to_host
from vfm_jax.objectives.base import Batch, PyTree, Visualises
from vfm_jax.objectives.frozen import with_frozen


def reconstruct(
  objective: Any, params: PyTree, extra: PyTree, batch: Batch, rng: jax.Array
) -> dict[str, np.ndarray]:
  """Return named videos uint8 [B, T, H, W, 3] on the host, in display order.

  Args:
    objective: one that satisfies `Visualises`.
    params: its parameters.
    extra: its non-gradient state.
    batch: as in training or evaluation; examples that are not `valid` are
      left out.
    rng: key of the masks.

  Raises:
    TypeError: the objective has no pictures to show.
  """
  if not isinstance(objective, Visualises):
    raise TypeError(
      f'{type(objective).__name__} has no visualise(params, extra, batch, '
      'rng); see Visualises in vfm_jax/objectives/base.py'
    )
  params = with_frozen(objective, params)
  shown = _visualise(Held(objective), params, extra, dict(batch), rng)
  keep = slice(None)
  if 'valid' in batch:
    keep = to_host(batch['valid']).astype(bool)
  videos = zip(shown.names, shown.videos, strict=True)
  return {name: to_host(video)[keep] for name, video in videos}


def save_reconstruction(
  videos: Mapping[str, np.ndarray],
  folder: str | os.PathLike,
  stem: str,
  *,
  fps: float = 8.0,
) -> tuple[pathlib.Path, pathlib.Path]:
  """Write `<folder>/<stem>.png` and `.gif`; return the two paths."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  return (
    plots.clip_grid(videos, folder / f'{stem}.png', title=stem),
    plots.animate(videos, folder / f'{stem}.gif', fps=fps),
  )


class _Shown(flax.struct.PyTreeNode):
  """Carry names beside videos: jit would sort the keys of a dict."""

  videos: list[jax.Array]
  names: tuple[str, ...] = flax.struct.field(pytree_node=False)


@functools.partial(jax.jit, static_argnums=0)
def _visualise(held, params, extra, batch, rng):
  videos = held.objective.visualise(params, extra, batch, rng)
  return _Shown(videos=list(videos.values()), names=tuple(videos))
