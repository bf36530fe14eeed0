"""Classify by the nearest neighbours of frozen features.

The protocol of the TWLV-I evaluation framework (arXiv 2408.11318 and its
repository, `knn`): cosine similarity s_j to every row of the bank, the top
k = 200 rows vote for their class with weight exp(s_j / T), T = 0.1, and a
query that has several clips sums the votes of its clips. Every clip of a
training video is a bank entry of its own.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from vfm_jax.evals.base import Features, top1


@dataclasses.dataclass(frozen=True)
class KNNResult:
  """Votes f32 [n, C], predicted class int32 [n], and top-1 in [0, 1]."""

  scores: np.ndarray
  predictions: np.ndarray
  top1: float


@dataclasses.dataclass(frozen=True)
class KNN:
  """Configure the k-nearest-neighbour probe.

  Attributes:
    k: neighbours that vote; at most the number of rows in the bank.
    temperature: T of the vote exp(s / T).
    bank_batch: None puts every training video in the bank. A batch size drops
      the videos that the official loader drops (it shuffles by `seed` and
      throws the last, partial batch away; the published numbers come from
      batch 1024 and seed 12), for parity with those numbers only.
    chunk: rows of the bank, and queries, compared at a time. It bounds memory
      and does not change the answer.
  """

  k: int = 200
  temperature: float = 0.1
  bank_batch: int | None = None
  chunk: int = 4096

  def __post_init__(self):
    if self.k < 1 or self.chunk < 1:
      raise ValueError(
        f'knn.k and knn.chunk must be 1 or more, found {self.k}, {self.chunk}'
      )
    if not self.temperature * 88 > 1:
      raise ValueError(
        'knn.temperature must be above 1/88, where exp(1 / T) leaves float32, '
        f'found {self.temperature}'
      )

  @property
  def name(self) -> str:
    """Protocol name that metric names carry."""
    return f'knn{self.k}'

  def run(
    self,
    train: Features,
    val: Features,
    num_classes: int,
    *,
    seed: int = 0,
  ) -> KNNResult:
    """Classify `val` with `train` as the bank.

    Raises:
      ValueError: the bank has fewer than k rows, or a label is out of range.
    """
    if self.bank_batch is not None:
      train = train.take(self.bank_items(len(train.y), seed))
    rows = self.scores(train.x, train.y[train.video], val.x, num_classes)
    scores = np.zeros((len(val.y), num_classes), np.float32)
    np.add.at(scores, val.video, rows)
    predictions = scores.argmax(-1).astype(np.int32)
    return KNNResult(scores, predictions, top1(scores, val.y))

  def bank_items(self, n: int, seed: int) -> np.ndarray:
    """Return the training videos in the bank, int [m], in bank order."""
    if self.bank_batch is None:
      return np.arange(n)
    keep = n - n % self.bank_batch
    if not keep:
      raise ValueError(
        f'knn.bank_batch={self.bank_batch} drops all {n} training videos; '
        f'set it to {n} or less, or to None for the full bank'
      )
    return loader_order(n, seed)[:keep]

  def scores(
    self,
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    num_classes: int,
  ) -> np.ndarray:
    """Return the votes f32 [Q, C] of bank [N, D] with labels [N] on [Q, D]."""
    n, dim = bank.shape
    if self.k > n:
      raise ValueError(
        f'knn.k={self.k} neighbours asked of a bank of {n} rows; '
        f'set knn.k to {n} or less'
      )
    if queries.shape[1:] != (dim,):
      raise ValueError(
        f'the bank has {dim} features, the queries {queries.shape[1:]}'
      )
    labels = np.asarray(bank_labels, np.int32)
    if labels.min() < 0 or labels.max() >= num_classes:
      raise ValueError(
        f'bank labels must lie in [0, {num_classes}), found '
        f'[{labels.min()}, {labels.max()}]'
      )
    size = min(self.chunk, n)
    votes = _votes(
      _chunks(np.asarray(bank, np.float32), size),
      _chunks(labels, size),
      _chunks(np.asarray(queries, np.float32), min(self.chunk, len(queries))),
      jnp.int32(n),
      jnp.float32(self.temperature),
      k=self.k,
      num_classes=num_classes,
    )
    return np.asarray(votes)[: len(queries)]


def normalize(x: jax.Array) -> jax.Array:
  """Divide rows [..., D] by max(||x||, 1e-12)."""
  norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
  return x / jnp.maximum(norm, 1e-12)


def loader_order(n: int, seed: int) -> np.ndarray:
  """Return the order, int [n], of the official shuffled loader after seeding.

  Mersenne twister, as the official framework draws it: two words seed the
  workers, the next two seed the sampler, which shuffles by drawing from what
  is left. It makes `bank_batch` drop the very videos the official run drops.
  """
  word = functools.partial(np.random.RandomState.randint, low=0, high=2**32)
  parent = np.random.RandomState(seed)
  words = [int(word(parent, dtype=np.uint32)) for _ in range(4)]
  # The 64-bit seed is (words[2] << 32 | words[3]); the twister takes its low
  # 32 bits.
  sampler = np.random.RandomState(words[3])
  order = np.arange(n)
  for i in range(n - 1):
    j = i + int(word(sampler, dtype=np.uint32)) % (n - i)
    order[i], order[j] = order[j], order[i]
  return order


def _chunks(x: np.ndarray, size: int) -> np.ndarray:
  """Pad x [n, ...] with zeros to [ceil(n / size), size, ...]."""
  pad = [(0, -len(x) % size)] + [(0, 0)] * (x.ndim - 1)
  return np.pad(x, pad).reshape(-1, size, *x.shape[1:])


@functools.partial(jax.jit, static_argnames=('k', 'num_classes'))
def _votes(bank, labels, queries, n, temperature, *, k, num_classes):
  """Return votes [Q, C] from chunked bank, labels and queries.

  A running top k over the chunks: the full similarity matrix never exists.
  """
  bank = normalize(bank)
  chunk = bank.shape[1]
  starts = jnp.arange(bank.shape[0]) * chunk

  def visit(q, best, item):
    rows, row_labels, start = item
    # Full precision: the default of TPUs and GPUs rounds inputs, and
    # exp(s / 0.1) magnifies that tenfold.
    s = jnp.matmul(q, rows.T, precision=jax.lax.Precision.HIGHEST)
    real = start + jnp.arange(chunk) < n
    s = jnp.where(real, s, -jnp.inf)
    # Earlier rows first: top_k keeps the lower position on a tie, so ties
    # resolve as they would on the whole matrix.
    s = jnp.concatenate([best[0], s], axis=1)
    y = jnp.broadcast_to(row_labels, (q.shape[0], chunk))
    y = jnp.concatenate([best[1], y], axis=1)
    s, at = jax.lax.top_k(s, k)
    return (s, jnp.take_along_axis(y, at, axis=1)), None

  def classify(q):
    q = normalize(q)
    best = (
      jnp.full((q.shape[0], k), -jnp.inf, jnp.float32),
      jnp.zeros((q.shape[0], k), jnp.int32),
    )
    (s, y), _ = jax.lax.scan(
      functools.partial(visit, q), best, (bank, labels, starts)
    )
    votes = jnp.zeros((q.shape[0], num_classes), jnp.float32)
    at = jnp.arange(q.shape[0])[:, None]
    return votes.at[at, y].add(jnp.exp(s / temperature))

  out = jax.lax.map(classify, queries)
  return out.reshape(-1, num_classes)
