"""Draw stored embeddings in the plane: PCA, LDA and t-SNE.

As the TWLV-I evaluation framework does it (arXiv:2408.11318, repository):
two components by scikit-learn with its defaults, t-SNE with random_state 1212,
rainbow colours, points of size 5 on 15 x 10 inches. Two things that its script
stumbles over are defined here: with `rows='clip'` every clip of a video is a
point, and LDA of two classes, which has one axis, is drawn over an axis without
meaning.
"""

import dataclasses
import io
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from vfm_jax.evals import store
from vfm_jax.evals.base import Features
from vfm_jax.evals.outcome import Outcome
from vfm_jax.evals.report_data import EmbeddingMap
from vfm_jax.evals.stored import StoredSet

Method = Literal['pca', 'lda', 'tsne']
TITLES = {'pca': 'PCA', 'lda': 'LDA', 'tsne': 't-SNE'}
SEED = 1212


@dataclasses.dataclass(frozen=True)
class EmbeddingMaps:
  """Draw a split of a store; satisfies `StoredEvaluator`.

  Attributes:
    methods: some of `pca`, `lda` and `tsne`.
    split: `train` or `val`.
    sampling: level of the layout that is read; None where it has none.
    rows: `video` for a point a video, `clip` for a point a clip.
    label: `annotation`, or a name in the `labels` of the json.
    include: classes to draw; () for all.
    exclude: classes to leave out.
    random_classes: draw that many of the remaining classes, at random.
    keep: probability that a point is drawn.
    perplexity: of t-SNE; at most a third of the points but one is used.
    seed: of what is drawn and of t-SNE.
    picture: also make PNG files.
  """

  methods: tuple[Method, ...] = ('pca', 'lda', 'tsne')
  split: Literal['train', 'val'] = 'val'
  sampling: store.Sampling | None = 'uniform'
  rows: Literal['video', 'clip'] = 'video'
  label: str = 'annotation'
  include: tuple[int, ...] = ()
  exclude: tuple[int, ...] = ()
  random_classes: int | None = None
  keep: float = 1.0
  perplexity: float = 30.0
  seed: int = SEED
  picture: bool = True

  def __post_init__(self):
    if not self.methods or (bad := set(self.methods) - set(get_args(Method))):
      raise ValueError(
        f'maps.methods: expected some of {get_args(Method)}, found '
        f'{sorted(bad) if self.methods else "none"}'
      )
    if not 0 < self.keep <= 1:
      raise ValueError(f'maps.keep must lie in (0, 1], found {self.keep}')

  def run_stored(
    self, data: StoredSet, *, seed: int, mesh: Any = None
  ) -> Outcome:
    """Return the maps, and their pictures.

    Raises:
      StoreError: as `EmbeddingStore.features`.
      ValueError: too few points or classes are left.
    """
    del seed, mesh
    reader = data.split(self.split, self.sampling)
    x, y, ids = self.choose(
      reader.features(self.rows, self.label), list(reader.ids)
    )
    maps, pictures = [], {}
    level = [] if self.sampling is None else [self.sampling]
    about = ', '.join([data.dataset, *level, self.split, self.rows])
    for method in self.methods:
      xy = project(method, x, y, seed=self.seed, perplexity=self.perplexity)
      found = embedding_map(
        f'{about}, {TITLES[method]}', xy, y, ids, note=_note(method, xy)
      )
      maps.append(found)
      if self.picture:
        pictures[method] = draw(found)
    return Outcome(maps=tuple(maps), pictures=pictures)

  def choose(
    self, features: Features, ids: list[str]
  ) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return the points to draw: x [n, D], y [n] classes, and their names.

    A class keeps its number. Names of clips are `<id> [<clip>]`.

    Raises:
      ValueError: a class is not there, or no point is left.
    """
    rng = np.random.default_rng(self.seed)
    classes = np.unique(features.y)
    asked = np.array([*self.include, *self.exclude], int)
    if (missing := np.setdiff1d(asked, classes)).size:
      raise ValueError(
        'maps.include and maps.exclude: no video has the classes '
        f'{missing.tolist()}'
      )
    if self.include:
      classes = np.array(self.include)
    classes = np.setdiff1d(classes, np.array(self.exclude, int))
    if self.random_classes is not None:
      if not 1 <= self.random_classes <= len(classes):
        raise ValueError(
          f'maps.random_classes={self.random_classes}: expected 1 to '
          f'{len(classes)}, the classes there are'
        )
      classes = rng.choice(classes, self.random_classes, replace=False)
    owner = features.video
    rows = np.isin(features.y[owner], classes)
    rows &= rng.random(len(rows)) < self.keep
    if rows.sum() < 2:
      raise ValueError(
        f'maps: {rows.sum()} points are left to draw; change maps.keep, '
        'maps.include or maps.exclude'
      )
    first = np.searchsorted(owner, owner)
    names = [
      ids[v] if features.one_row_each else f'{ids[v]} [{i - first[i]}]'
      for i, v in enumerate(owner)
      if rows[i]
    ]
    return features.x[rows], features.y[owner[rows]], names


def project(
  method: Method,
  x: np.ndarray,
  y: np.ndarray,
  *,
  seed: int = SEED,
  perplexity: float = 30.0,
) -> np.ndarray:
  """Return points [n, D] of classes y [n] in the plane.

  Returns:
    float64 [n, 2]; [n, 1] for LDA of two classes, which have no second axis.

  Raises:
    ValueError: LDA of one class, or of as many classes as points; fewer than
      four points for t-SNE.
  """
  x = np.asarray(x, np.float64)
  classes = len(np.unique(y))
  if method == 'pca':
    from sklearn.decomposition import PCA

    return PCA(min(2, *x.shape), random_state=seed).fit_transform(x)
  if method == 'lda':
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    if not 1 < classes < len(x):
      raise ValueError(
        f'LDA needs two classes or more, and more points than classes; found '
        f'{classes} classes and {len(x)} points'
      )
    axes = min(2, classes - 1, x.shape[1])
    return LinearDiscriminantAnalysis(n_components=axes).fit_transform(x, y)
  from sklearn.manifold import TSNE

  if len(x) < 4:
    raise ValueError(f't-SNE needs 4 points or more, found {len(x)}')
  perplexity = min(perplexity, (len(x) - 1) / 3)
  # The start by PCA wants two features.
  x = np.pad(x, ((0, 0), (0, max(2 - x.shape[1], 0))))
  return TSNE(perplexity=perplexity, random_state=seed).fit_transform(x)


def embedding_map(
  name: str,
  xy: np.ndarray,
  y: Sequence[int] | np.ndarray,
  ids: Sequence[str],
  *,
  classes: dict[int, str] | None = None,
  note: str = '',
) -> EmbeddingMap:
  """Hold points for the report.

  Args:
    name: of the map.
    xy: float [n, 2], or [n, 1]: then the points are spread over the second
      axis, evenly.
    y: int [n] class of each.
    ids: name of each.
    classes: names of the classes; their numbers by default.
    note: how the map was made.
  """
  numbers, places = np.unique(y, return_inverse=True)
  if xy.shape[1] == 1:
    spread = np.arange(len(xy)) * 0.6180339887 % 1
    xy = np.stack([xy[:, 0], spread], 1)
  return EmbeddingMap(
    name=name,
    points=np.asarray(xy, float).round(5).tolist(),
    labels=places.tolist(),
    classes=[(classes or {}).get(int(c), str(c)) for c in numbers],
    ids=list(ids),
    note=note,
  )


def draw(found: EmbeddingMap) -> bytes:
  """Return a map as a PNG of 1500 x 1000 pixels."""
  import matplotlib
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(15, 10), dpi=100)
  axis = figure.add_subplot()
  points, labels = np.array(found.points), np.array(found.labels)
  colours = matplotlib.colormaps['rainbow'](
    np.linspace(0, 1, len(found.classes))
  )
  for c, name in enumerate(found.classes):
    at = labels == c
    axis.scatter(*points[at].T, s=5, color=colours[c], label=name)
  axis.set_title('\n'.join(filter(None, [found.name, found.note])))
  if len(found.classes) <= 20:
    axis.legend(markerscale=3)
  out = io.BytesIO()
  FigureCanvasAgg(figure).print_png(out)
  return out.getvalue()


def _note(method: Method, xy: np.ndarray) -> str:
  if method == 'lda' and xy.shape[1] == 1:
    return 'Two classes have one axis; the height of a point means nothing.'
  return ''
