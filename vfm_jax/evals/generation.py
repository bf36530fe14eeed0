"""Measure generated images against real ones.

A metric's name is `<metric>_<network>_<count>_<reference>`: what is measured,
what reads the images, how many are generated, and what they are compared with:
`val500` for 500 images of a pipeline, or the name of a file with the first 12
digits of its sha256. So `fid_inception2015_50000_imagenet256-0f2b...` is FID
of 50,000 images as the evaluator of ADM has it; with EfficientNet-lite0 the
same distance is `frechet_efficientnet_lite0_...` and never FID. Precision and
recall end with their number of neighbours, kernel distances with `<subsets>x
<size>`; the score of Inception has no reference.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

import jax
import numpy as np
from absl import logging

from vfm_jax.data.pipeline import Pipeline
from vfm_jax.evals import references, samples, summary
from vfm_jax.evals.base import Keeps
from vfm_jax.evals.frechet import frechet_distance
from vfm_jax.evals.inception_score import inception_score
from vfm_jax.evals.kernel import kernel_distance
from vfm_jax.evals.manifolds import precision_recall
from vfm_jax.evals.networks import EfficientNetLite0, Network
from vfm_jax.objectives.base import Batch, PyTree, Samples

Metric = Literal['frechet', 'spatial', 'score', 'kernel', 'precision_recall']

# The part of the activations that a metric reads: its distribution, or rows.
_MOMENTS = {'frechet': 'pool', 'spatial': 'spatial'}
_ROWS = {'kernel': 'pool', 'precision_recall': 'pool', 'score': 'logits'}


@dataclasses.dataclass(frozen=True)
class Generation(Keeps):
  """Draw images from an objective and measure them; satisfies `Evaluator`.

  Attributes:
    reference: real images, or an .npz file of `evals.references`.
    features: the network that reads the images.
    count: images to draw.
    metrics: what to measure. `frechet` is FID with Inception, `spatial` sFID,
      `score` the Inception score, `kernel` KID.
    labels: sample i takes label i % len(labels); all labels in turn by
      default.
    shape: of one example of the training data; that of the reference by
      default, and needed where the reference is a file or the data latents.
    reference_count: images of the pipeline to compare with, the first ones;
      all by default.
    batch_size: images drawn and read at a time.
    neighbours: of precision and recall.
    subsets: of the kernel distance.
    subset_size: images in each of them.
  """

  reference: Pipeline | str
  features: Network = EfficientNetLite0()
  count: int = 500
  metrics: tuple[str, ...] = ('frechet',)
  labels: tuple[int, ...] | None = None
  shape: tuple[int, ...] | None = None
  reference_count: int | None = None
  batch_size: int = 32
  neighbours: int = 3
  subsets: int = 100
  subset_size: int = 1000

  def __post_init__(self):
    bad = sorted(set(self.metrics) - set(get_args(Metric)))
    if bad or not self.metrics:
      raise ValueError(
        f'generation.metrics: expected some of {list(get_args(Metric))}, found '
        f'{list(self.metrics)}'
      )
    needed = {**_MOMENTS, **_ROWS}
    for metric in self.metrics:
      if needed[metric] not in self.features.parts:
        raise ValueError(
          f'generation.metrics: {metric} reads {needed[metric]!r}, which '
          f'{self.features.name} does not give; set generation.features to '
          'Inception2015'
        )
    if self.count < 2 or self.batch_size < 1:
      raise ValueError(
        'generation.count and .batch_size: expected at least 2 and 1, found '
        f'{self.count} and {self.batch_size}'
      )
    if 'kernel' in self.metrics and self.subset_size > self.count:
      raise ValueError(
        f'generation.subset_size: expected at most generation.count='
        f'{self.count}, found {self.subset_size}'
      )
    limit = self.reference_count
    if isinstance(self.reference, str):
      if limit is not None:
        raise ValueError(
          'generation.reference_count: expected None with a reference file, '
          f'found {limit}'
        )
    elif limit is not None and not 2 <= limit <= self.reference.num_examples:
      raise ValueError(
        'generation.reference_count: expected 2 to '
        f'{self.reference.num_examples}, the images of generation.reference, '
        f'found {limit}'
      )

  def run(
    self,
    objective: Any,
    params: PyTree,
    *,
    seed: int,
    mesh: jax.sharding.Mesh | None = None,
  ) -> dict[str, float]:
    """Return the metrics of `count` samples, named as the module says.

    Args:
      objective: one that satisfies `Samples`.
      params: its parameters, or an average of them.
      seed: of the samples.
      mesh: draws and reads over it; None uses one device.

    Raises:
      TypeError: the objective draws no samples.
      ValueError: `shape` is needed, a label is unknown, or the reference does
        not fit.
      OSError, ImportError: weights are missing.
    """
    if not isinstance(objective, Samples):
      raise TypeError(
        f'config.objective: {type(objective).__name__} draws no samples to '
        'measure; see Samples in vfm_jax/objectives/base.py'
      )
    real = self.real(mesh)
    labels = objective.check_labels(self.labels)
    shape = self._shape(objective.data)

    def chunks() -> Iterator[Iterable[Batch]]:
      step = summary.chunk_size(self.batch_size)
      for start in range(0, self.count, step):
        drawn = samples.draw_samples(
          objective,
          params,
          shape,
          labels,
          count=min(step, self.count - start),
          start=start,
          seed=seed,
          batch_size=self.batch_size,
          mesh=mesh,
        )
        yield summary.image_batches(drawn, self.batch_size, mesh)

    return self._compare(self._summarise(chunks(), self.metrics, mesh), real)

  def score(
    self, images: np.ndarray, mesh: jax.sharding.Mesh | None = None
  ) -> dict[str, float]:
    """Return the metrics of given images, uint8 [N, H, W, 3].

    Raises:
      BadReference: the images or the reference do not fit.
    """
    references.check_images('images', images)
    chunks = summary.image_chunks(images, self.batch_size, mesh)
    return self._compare(
      self._summarise(chunks, self.metrics, mesh), self.real(mesh)
    )

  def real(self, mesh: jax.sharding.Mesh | None = None) -> summary.Summary:
    """Return what is compared with; it is computed once.

    Raises:
      BadReference: the reference file is none, or does not fit the network or
        the metrics.
    """
    if 'real' not in self._kept:
      if isinstance(self.reference, str):
        self._kept['real'] = self._from_file(self.reference, mesh)
      else:
        chunks = summary.pipeline_chunks(
          self.reference, self.batch_size, self.reference_count, mesh
        )
        found = self._summarise(chunks, self._compared(), mesh)
        split = self.reference.path.rpartition('.')[2]
        self._kept['name'] = f'{split}{found.count}'
        self._kept['real'] = found
      self._check_rows(self._kept['real'])
    return self._kept['real']

  def _from_file(self, path: str, mesh) -> summary.Summary:
    file = references.read_reference(path)
    for part, normal in file.normals.items():
      wanted = self.features.parts.get(part)
      if wanted is not None and normal.mean.shape != (wanted,):
        raise references.BadReference(
          f'{path}: expected statistics of {wanted} values for the {part!r} of '
          f'{self.features.name}, found {normal.mean.size}; change '
          'generation.reference or generation.features'
        )
    # Statistics that the file brings are not computed from its images.
    missing = [
      metric
      for metric in self._compared()
      if _MOMENTS.get(metric) not in file.normals
    ]
    out = summary.Summary(0, {}, {})
    if missing:
      if file.images is None:
        raise references.BadReference(
          f'{path}: {missing} need the images `arr_0`, found statistics of '
          f'{sorted(file.normals)} alone; change generation.metrics or '
          'generation.reference'
        )
      chunks = summary.image_chunks(file.images, self.batch_size, mesh)
      out = self._summarise(chunks, missing, mesh)
    logging.info('Reference %s has the sha256 %s.', path, file.sha256)
    self._kept['name'] = file.name
    return out._replace(normals={**out.normals, **file.normals})

  def _check_rows(self, real: summary.Summary) -> None:
    """Refuse too few real images before any sample is drawn."""
    needed = {
      'kernel': ('subset_size', self.subset_size),
      'precision_recall': ('neighbours', self.neighbours + 1),
    }
    for metric, (field, least) in needed.items():
      if metric in self.metrics and real.count < least:
        raise references.BadReference(
          f'generation.{field}: {metric} needs at least {least} images in '
          f'generation.reference, found {real.count}'
        )

  def _compared(self) -> list[str]:
    """Return the metrics that need real images."""
    return [m for m in self.metrics if m != 'score']

  def _summarise(self, chunks, metrics, mesh) -> summary.Summary:
    return summary.summarise(
      self.features,
      chunks,
      moments={_MOMENTS[m] for m in metrics if m in _MOMENTS},
      keep={_ROWS[m] for m in metrics if m in _ROWS},
      mesh=mesh,
    )

  def _compare(self, fake, real) -> dict[str, float]:
    about = f'{self.features.name}_{fake.count}'
    against = f'{about}_{self._kept["name"]}'
    titles, out = self.features.titles, {}
    for metric in self.metrics:
      if metric in _MOMENTS:
        part = _MOMENTS[metric]
        out[f'{titles[metric]}_{against}'] = frechet_distance(
          fake.normals[part], real.normals[part]
        )
      elif metric == 'score':
        out[f'{titles[metric]}_{about}'] = inception_score(fake.rows['logits'])
      elif metric == 'kernel':
        name = f'{against}_{self.subsets}x{self.subset_size}'
        mean, std = kernel_distance(
          fake.rows['pool'],
          real.rows['pool'],
          subsets=self.subsets,
          subset_size=self.subset_size,
        )
        out[f'{titles[metric]}_{name}'] = mean
        out[f'{titles[metric]}_std_{name}'] = std
      else:
        precision, recall = precision_recall(
          real.rows['pool'], fake.rows['pool'], k=self.neighbours
        )
        out[f'precision_{against}_k{self.neighbours}'] = precision
        out[f'recall_{against}_k{self.neighbours}'] = recall
    return out

  def _shape(self, data: str) -> tuple[int, ...]:
    """Return the shape of one example of the training data."""
    if self.shape is not None:
      return self.shape
    if not isinstance(self.reference, str):
      spec = self.reference.element_spec(1).get(data)
      if spec is not None:
        return spec.shape[1:]
    raise ValueError(
      f'generation.shape: expected the shape of one {data!r} of the training '
      'data, which the reference does not tell; found None'
    )
