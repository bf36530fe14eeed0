"""Draw samples of a trained denoiser and write them for eyes and evaluators."""

import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from vfm_jax import plots, sharding
from vfm_jax.evals.base import Held, to_host
from vfm_jax.objectives.base import PyTree, Samples, example_keys
from vfm_jax.objectives.frozen import with_frozen


def draw_samples(
  objective: Any,
  params: PyTree,
  shape: tuple[int, ...],
  labels: Sequence[int] | None,
  *,
  count: int,
  start: int = 0,
  seed: int = 0,
  batch_size: int = 16,
  mesh: Any = None,
) -> np.ndarray:
  """Return samples uint8 [count, T, H, W, 3].

  Sample i depends on the seed, i and its label, not on the batch size.

  Args:
    objective: one that satisfies `Samples`.
    params: its parameters, or an average of them.
    shape: of one sample, as in the data.
    labels: label i % len(labels) goes to sample i; None for no labels.
    count: number of samples.
    start: number of the first one.
    seed: of the keys.
    batch_size: samples drawn at once.
    mesh: devices to draw on.

  Raises:
    TypeError: the objective draws no samples.
  """
  if not isinstance(objective, Samples):
    raise TypeError(
      f'{type(objective).__name__} has no sample(params, keys, shape, y); see '
      'Samples in vfm_jax/objectives/base.py'
    )
  held, drawn = Held(objective), []
  params = with_frozen(objective, params)
  for first in range(start, start + count, batch_size):
    # The last batch is filled up, so that one program serves all.
    rows = np.arange(first, first + batch_size, dtype=np.int32)
    batch = {'row': rows}
    if labels is not None:
      batch['y'] = np.asarray(labels, np.int32)[rows % len(labels)]
    if mesh is not None:
      batch = sharding.put_batch(batch, mesh)
    drawn.append(
      to_host(_draw(held, params, batch, jax.random.key(seed), shape))
    )
  return np.concatenate(drawn)[:count]


def save_samples(
  samples: np.ndarray,
  labels: Sequence[int] | None,
  folder: str | os.PathLike,
  stem: str,
) -> dict[str, pathlib.Path]:
  """Write samples for outside evaluators and as a picture.

  Returns:
    `npz`: `arr_0` uint8 [N, H, W, 3] (clips: [N, T, H, W, 3]) and, with
    labels, `arr_1` int64 [N], the layout of the ADM evaluator; `picture`: a
    grid of all samples, PNG or, for clips, an animation.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  arrays = [samples[:, 0] if samples.shape[1] == 1 else samples]
  if labels is not None:
    order = np.arange(len(samples)) % len(labels)
    arrays.append(np.asarray(labels, np.int64)[order])
  npz = folder / f'{stem}.npz'
  np.savez(npz, *arrays)
  return {
    'npz': npz,
    'picture': plots.sample_grid(samples, folder / stem),
  }


@functools.partial(jax.jit, static_argnums=(0, 4))
def _draw(held, params, batch, rng, shape):
  keys = example_keys(rng, batch)
  return held.objective.sample(params, keys, shape, batch.get('y'))
