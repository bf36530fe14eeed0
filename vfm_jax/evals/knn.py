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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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
    t = '' if self.temperature == 0.1 else f'_t{self.temperature:g}'
    bank = '' if self.bank_batch is None else f'_bank{self.bank_batch}'
    return f'knn{self.k}{t}{bank}'

  def run(
    self,
    train: Features,
    val: Features,
    num_classes: int,
    *,
    seed: int = 0,
    mesh: Mesh | None = None,
  ) -> KNNResult:
    """Classify `val` with `train` as the bank.

    Args:
      train: the bank.
      val: the queries.
      num_classes: number of classes.
      seed: of the order that `bank_batch` takes.
      mesh: devices to cut the bank over; None uses one.

    Raises:
      ValueError: the bank has fewer than k rows, or a label is out of range.
    """
    if self.bank_batch is not None:
      train = train.take(self.bank_items(len(train.y), seed))
    rows = self.scores(
      train.x, train.y[train.video], val.x, num_classes, mesh=mesh
    )
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
    *,
    mesh: Mesh | None = None,
  ) -> np.ndarray:
    """Return the votes f32 [Q, C] of bank [N, D] with labels [N] on [Q, D].

    With a mesh the bank is cut over all its devices, with the same answer.
    """
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
    rows, asked = np.asarray(bank, np.float32), np.asarray(queries, np.float32)
    asked = _chunks(asked, min(self.chunk, len(queries)))
    if mesh is not None:
      # Every device has equally many rows; those past the end don't count.
      rows, labels = (
        np.pad(x, [(0, -n % mesh.size)] + [(0, 0)] * (x.ndim - 1))
        for x in (rows, labels)
      )
      split = NamedSharding(mesh, PartitionSpec(tuple(mesh.axis_names)))
      whole = NamedSharding(mesh, PartitionSpec())
      rows, labels, asked = (
        jax.make_array_from_callback(x.shape, where, x.__getitem__)
        for x, where in ((rows, split), (labels, split), (asked, whole))
      )
    votes = _votes(
      rows,
      labels,
      asked,
      jnp.int32(n),
      jnp.float32(self.temperature),
      k=self.k,
      chunk=self.chunk,
      num_classes=num_classes,
      mesh=mesh,
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


@functools.partial(
  jax.jit, static_argnames=('k', 'chunk', 'num_classes', 'mesh')
)
def _votes(
  bank,
  labels,
  queries,
  n,
  temperature,
  *,
  k,
  chunk,
  num_classes,
  mesh=None,
):
  """Return votes [Q, C] of a bank [N, D], labels [N] on chunks of queries.

  A running top k over chunks of the bank: the full similarity matrix never
  exists. With a mesh each device searches its part of the bank, and the best
  of all devices are merged.
  """
  near = functools.partial(_nearest, n=n, k=k, chunk=chunk)
  if mesh is None:
    s, y = near(bank, labels, queries, jnp.int32(0))
  else:
    axes = tuple(mesh.axis_names)
    local = bank.shape[0] // mesh.size

    def search(bank, labels, queries):
      first = jax.lax.axis_index(axes) * local
      found = near(bank, labels, queries, first)
      return jax.tree.map(
        lambda x: jax.lax.all_gather(x, axes, axis=2, tiled=True), found
      )

    s, y = jax.shard_map(
      search,
      mesh=mesh,
      in_specs=(PartitionSpec(axes), PartitionSpec(axes), PartitionSpec()),
      out_specs=PartitionSpec(),
      check_vma=False,
    )(bank, labels, queries)
    # The parts stand in the order of the bank, so ties resolve as before.
    s, at = jax.lax.top_k(s, k)
    y = jnp.take_along_axis(y, at, axis=2)
  s, y = (x.reshape(-1, k) for x in (s, y))
  votes = jnp.zeros((s.shape[0], num_classes), jnp.float32)
  at = jnp.arange(s.shape[0])[:, None]
  return votes.at[at, y].add(jnp.exp(s / temperature))


def _nearest(bank, labels, queries, first, *, n, k, chunk):
  """Return similarities and labels [P, Q, k] of the nearest rows.

  Args:
    bank: [m, D] part of the bank.
    labels: int32 [m].
    queries: [P, Q, D] chunks of the queries.
    first: number of this part's first row in the whole bank.
    n: rows of the whole bank that are no padding.
    k: how many rows to return.
    chunk: rows to compare at a time.
  """
  size = min(chunk, bank.shape[0])
  starts = jnp.arange(-(-bank.shape[0] // size)) * size

  def visit(q, best, start):
    # The last chunk begins early, with rows that were seen, to be full.
    at = jnp.minimum(start, bank.shape[0] - size)
    rows = normalize(jax.lax.dynamic_slice_in_dim(bank, at, size))
    row_labels = jax.lax.dynamic_slice_in_dim(labels, at, size)
    number = at + jnp.arange(size)
    new = (number >= start) & (first + number < n)
    # Full precision: the default of TPUs and GPUs rounds inputs, and
    # exp(s / 0.1) magnifies that tenfold.
    s = jnp.matmul(q, rows.T, precision=jax.lax.Precision.HIGHEST)
    s = jnp.where(new, s, -jnp.inf)
    # Earlier rows first: top_k keeps the lower position on a tie, so ties
    # resolve as they would on the whole matrix.
    s = jnp.concatenate([best[0], s], axis=1)
    s, place = jax.lax.top_k(s, k)
    # Places below k are of the best so far, the others of this chunk.
    y = jnp.where(
      place < k,
      jnp.take_along_axis(best[1], jnp.minimum(place, k - 1), axis=1),
      row_labels[jnp.maximum(place - k, 0)],
    )
    return (s, y), None

  def search(q):
    q = normalize(q)
    best = (
      jnp.full((q.shape[0], k), -jnp.inf, jnp.float32),
      jnp.zeros((q.shape[0], k), jnp.int32),
    )
    return jax.lax.scan(functools.partial(visit, q), best, starts)[0]

  return jax.lax.map(search, queries)
