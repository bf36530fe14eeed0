"""Write and read sets of latents in ArrayRecord shards.

The data of a record are moments [V, 2, (T,) h, w, C]: V = 2 for a picture and
its mirror image, or 1; mean and standard deviation, not scaled. See
`data.shards` for the rest of the format.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from vfm_jax.data import once, shards, sources

KIND = shards.Kind(
  format='vfm_jax.latents',
  version=1,
  things='latents',
  command='python -m vfm_jax.main latents',
  where='data.source.root',
)

Dtype = Literal['float16', 'float32']


@dataclasses.dataclass(frozen=True)
class About:
  """Say what all latents of a set share; part of its manifest.

  Attributes:
    shape: of a latent, (h, w, C) or (T, h, w, C).
    dtype: of the stored moments. float16 halves the files; it rounds to 11
      bits, 5e-4 of each number at most.
    flips: whether the mirror image of each example is there.
    scaling: a model learns (latent - shift) * scaling.
    shift: see `scaling`.
    vae_sha256: hash of the autoencoder's file.
    label_names: names of the labels.
  """

  shape: tuple[int, ...]
  dtype: Dtype
  flips: bool
  scaling: float
  shift: float
  vae_sha256: str
  label_names: tuple[str, ...]

  @property
  def record_shape(self) -> tuple[int, ...]:
    """Return the shape of the moments of an example."""
    return (1 + self.flips, 2, *self.shape)


class LatentWriter:
  """Write a set; a context manager that leaves nothing behind on an error."""

  def __init__(self, out: str | os.PathLike, about: About, num_shards: int = 1):
    """Open the shards.

    Raises:
      FileExistsError: `out` exists already.
      ValueError: there are no shards.
    """
    if num_shards < 1:
      raise ValueError(f'--shards: at least 1, found {num_shards}')
    self._writer = shards.Writer(KIND, out, num_shards)
    self._about = about

  def write(
    self, name: str, labels: Mapping[str, int], moments: np.ndarray
  ) -> None:
    """Add an example.

    Args:
      name: its id.
      labels: its labels.
      moments: f32 [V, 2, (T,) h, w, C].

    Raises:
      ValueError: the moments are of another shape, or not finite in the type
        of the set.
    """
    about = self._about
    if moments.shape != about.record_shape:
      raise ValueError(
        f'expected moments {about.record_shape} of {name}, found '
        f'{moments.shape}; all examples of a set have one size: crop or resize '
        'in the transform of the pipeline'
      )
    with np.errstate(over='ignore'):
      stored = moments.astype(f'<{np.dtype(about.dtype).str[1:]}')
    if not np.isfinite(stored).all():
      raise ValueError(
        f'the latents of {name} are not finite in {about.dtype}, the largest '
        f'is {np.abs(moments).max():g}; try --latent_dtype=float32, or an '
        'autoencoder in float32'
      )
    self._writer.write(shards.pack_record(name, labels, stored.tobytes()))

  def finish(self, skipped: Sequence[Mapping[str, str]] = ()) -> dict[str, Any]:
    """Make the set visible and return its manifest.

    Args:
      skipped: id and reason of each example that was left out.

    Raises:
      ValueError: there are fewer latents than shards.
    """
    counts = self._writer.counts
    if not all(counts):
      raise ValueError(
        f'--shards: {len(counts)} shards are too many for {sum(counts)} '
        f'latents; first examples left out: {list(skipped)[:3]}'
      )
    about = dataclasses.asdict(self._about)
    return self._writer.finish({**about, 'skipped': list(skipped)})

  def __enter__(self) -> 'LatentWriter':
    return self

  def __exit__(self, *exc: object) -> None:
    self._writer.__exit__(*exc)


@dataclasses.dataclass(frozen=True)
class Latents:
  """Read what the `latents` verb wrote.

  Attributes:
    root: folder of the shards and of `manifest.json`.
    check_hashes: compare the SHA-256 of every shard before anything is read,
      which reads all data once in each process that opens the set.
  """

  root: str
  check_hashes: bool = True

  @property
  def about(self) -> About:
    """Return what all latents share.

    Raises:
      ValueError: the set is incomplete, changed or of another format.
    """
    return _open(self.root, self.check_hashes)[0]

  def __len__(self) -> int:
    return len(_open(self.root, self.check_hashes)[1])

  def __getitem__(self, index: int) -> tuple[str, dict[str, int], np.ndarray]:
    """Return (id, labels, moments f32 [V, 2, (T,) h, w, C])."""
    about, records = _open(self.root, self.check_hashes)
    sources.check_index(index, len(records))
    name, labels, data = shards.unpack_record(records[index])
    stored = np.frombuffer(data, f'<{np.dtype(about.dtype).str[1:]}')
    if stored.size != np.prod(about.record_shape):
      raise ValueError(
        f'{KIND.where}: expected {about.record_shape} numbers for {name} in '
        f'{self.root}, found {stored.size}; write the set again'
      )
    return name, labels, stored.reshape(about.record_shape).astype(np.float32)


@once.once()
def _open(root: str, check_hashes: bool) -> tuple[About, shards.Records]:
  manifest, records = shards.open_set(KIND, root, check_hashes=check_hashes)
  names = [f.name for f in dataclasses.fields(About)]
  if missing := [n for n in names if n not in manifest]:
    raise ValueError(
      f'{KIND.where}: {os.path.join(root, shards.MANIFEST)} lacks '
      f'{", ".join(missing)}; expected {json.dumps(names)}'
    )
  values = {n: manifest[n] for n in names}
  for key in ('shape', 'label_names'):
    values[key] = tuple(values[key])
  return About(**values), records
