"""Define what the loop asks of an evaluator, and the features probes share."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol, Self, runtime_checkable

import jax
import numpy as np
from jax.experimental import multihost_utils

PyTree = Any


@runtime_checkable
class Evaluator(Protocol):
  """What train.py calls every N steps and the `eval` verb calls once."""

  def run(
    self, objective: Any, params: PyTree, *, seed: int, mesh: Any = None
  ) -> dict[str, float]:
    """Return named scalars; a name carries the protocol behind the number."""
    ...


@runtime_checkable
class InRun(Protocol):
  """Optional: an evaluator that reads or writes files of the run."""

  def in_run(self, workdir: str, name: str) -> Evaluator:
    """Return the evaluator for a run.

    Args:
      workdir: of the run.
      name: of the evaluator in `config.evals`.
    """
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writes:
  """Let an evaluator write files, anew each time; satisfies `InRun`.

  Attributes:
    folder: where to; None is `evals/<name>` in the run's work directory, and
      outside of a run writes nothing.
  """

  folder: str | None = None

  def in_run(self, workdir: str, name: str) -> Self:
    """Return the evaluator with a folder."""
    if self.folder is not None:
      return self
    return dataclasses.replace(self, folder=f'{workdir}/evals/{name}')

  def made(self) -> pathlib.Path | None:
    """Return the folder, which is made; None on all processes but the first."""
    if self.folder is None or jax.process_index():
      return None
    folder = pathlib.Path(self.folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@dataclasses.dataclass(frozen=True)
class Keeps:
  """Let an evaluator keep in `_kept` what all its runs in a process need.

  It is no part of the value: neither compared nor sent to other processes.
  """

  _kept: dict[str, Any] = dataclasses.field(
    default_factory=dict, init=False, repr=False, compare=False
  )

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, '_kept': {}}


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
  """Hold frozen features of a set of videos, one or several rows a video.

  Attributes:
    x: f32 [N, D] feature rows; the rows of a video are adjacent, in time order.
    y: int32 [n] class of each video.
    video: int32 [N] the video that owns each row, ascending from 0 to n - 1.
  """

  x: np.ndarray
  y: np.ndarray
  video: np.ndarray

  def __post_init__(self):
    n = len(self.y)
    if self.x.ndim != 2 or self.y.ndim != 1 or len(self.x) != len(self.video):
      raise ValueError(
        'features need x [N, D], y [n] and video [N], found '
        f'x {self.x.shape}, y {self.y.shape}, video {self.video.shape}'
      )
    if not np.array_equal(np.unique(self.video), np.arange(n)) or np.any(
      np.diff(self.video) < 0
    ):
      raise ValueError(
        f'every one of the {n} videos needs at least one row, and rows must be '
        'in the order of their videos'
      )
    if n and self.y.min() < 0:
      raise ValueError(
        f'labels must be 0 or more, found {self.y.min()} at video '
        f'{int(self.y.argmin())}'
      )

  @classmethod
  def of_videos(cls, x: np.ndarray, y: np.ndarray) -> 'Features':
    """Hold one row a video: x [n, D], y [n]."""
    return cls(
      np.asarray(x, np.float32),
      np.asarray(y, np.int32),
      np.arange(len(x), dtype=np.int32),
    )

  @classmethod
  def of_clips(cls, clips: Sequence[np.ndarray], y: np.ndarray) -> 'Features':
    """Hold M_i >= 1 rows a video: clips is a list of [M_i, D], y [n]."""
    counts = [len(c) for c in clips]
    return cls(
      np.concatenate(clips).astype(np.float32),
      np.asarray(y, np.int32),
      np.repeat(np.arange(len(clips), dtype=np.int32), counts),
    )

  @property
  def counts(self) -> np.ndarray:
    """Number of rows of each video, int [n]."""
    return np.bincount(self.video, minlength=len(self.y))

  @property
  def one_row_each(self) -> bool:
    """Whether every video has exactly one row."""
    return len(self.x) == len(self.y)

  def take(self, videos: np.ndarray) -> 'Features':
    """Return the given videos (int [m]) in the given order."""
    counts = self.counts
    split = np.split(np.arange(len(self.x)), np.cumsum(counts)[:-1])
    rows = np.concatenate([split[v] for v in videos])
    owner = np.repeat(np.arange(len(videos), dtype=np.int32), counts[videos])
    return Features(self.x[rows], self.y[videos], owner)


def top1(scores: np.ndarray, y: np.ndarray) -> float:
  """Return the fraction of rows of scores [n, C] whose argmax is y [n]."""
  return float(np.mean(np.argmax(scores, axis=-1) == np.asarray(y)))


def class_count(*features: Features) -> int:
  """Return the smallest class count that holds every label seen."""
  return 1 + max(int(f.y.max()) for f in features)


class Held:
  """Make an objective a static argument of `jax.jit`, by identity.

  Objectives are frozen but may hold what has no hash; a compiled evaluation
  is reused as long as the objective is the same object.
  """

  def __init__(self, objective: Any):
    self.objective = objective

  def __hash__(self) -> int:
    return id(self.objective)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Held) and other.objective is self.objective


def to_host(x: jax.Array | np.ndarray) -> np.ndarray:
  """Return a whole array on this host, wherever its shards are."""
  if not isinstance(x, np.ndarray) and not x.is_fully_addressable:
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
  return np.asarray(x)
