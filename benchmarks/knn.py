"""Time the kNN probe against torch.

A bank of 50,000 embeddings of 768 features, 512 queries, k = 200, 400 classes:
normalise both, find the nearest, let them vote. The peer votes as the TWLV-I
evaluation framework does, through a one-hot table of all neighbours. As a
program (`python -m benchmarks.knn NAME`) this is one contestant.
"""

from benchmarks import contestants, interleave, results

BANK, WIDTH, QUERIES, NEIGHBOURS, CLASSES = 50_000, 768, 512, 200, 400
TEMPERATURE = 0.1
BARS = {'vfm_jax': 0.45}


def run(rounds: int) -> results.Comparison:
  """Compare the time of all queries."""
  seconds, info = interleave.compare(
    contestants.against_torch('benchmarks.knn'), rounds=rounds, repeats=1
  )
  return results.Comparison(
    title=f'kNN, {BANK:,} x {WIDTH}, {QUERIES} queries, k {NEIGHBOURS}',
    reference='torch eager',
    seconds=seconds,
    bars=BARS,
    notes=contestants.notes(
      'Normalising, search and votes; all predictions are the same;',
      'torch on the whole matrix: matmul, topk and weighted one-hot rows',
    ),
    info=info,
  )


def data():
  """Return a bank, its labels, and queries; classes overlap."""
  import numpy as np

  rng = np.random.default_rng(0)
  centres = rng.standard_normal((CLASSES, WIDTH), np.float32)

  def draw(n):
    y = rng.integers(0, CLASSES, n)
    noise = 4 * rng.standard_normal((n, WIDTH), np.float32)
    return centres[y] + noise, y

  bank, labels = draw(BANK)
  return bank, labels, draw(QUERIES)[0]


def work(predictions) -> dict[str, list[int]]:
  """Return what has to be equal for a fair comparison."""
  return dict(predictions=[int(y) for y in predictions])


def serve_vfm_jax() -> None:
  """Be the contestant of this library."""
  import jax

  from vfm_jax.evals.knn import KNN

  knn = KNN(k=NEIGHBOURS, temperature=TEMPERATURE)
  bank, labels, queries = data()

  def one():
    return knn.scores(bank, labels, queries, CLASSES)

  interleave.serve(one, work=work(one().argmax(1)), version=jax.__version__)


def serve_torch(compiled: bool) -> None:
  """Be the contestant of torch."""
  import torch

  torch.set_num_threads(contestants.CORES)
  bank, labels, queries = map(torch.from_numpy, data())

  def classify(bank, labels, queries):
    bank = torch.nn.functional.normalize(bank, dim=1)
    queries = torch.nn.functional.normalize(queries, dim=1)
    nearest, at = (queries @ bank.T).topk(NEIGHBOURS, dim=1)
    table = torch.zeros(at.numel(), CLASSES)
    table.scatter_(1, labels[at].view(-1, 1), 1.0)
    weights = (nearest / TEMPERATURE).exp()
    table = table.view(len(queries), NEIGHBOURS, CLASSES)
    return (table * weights[:, :, None]).sum(1)

  predict = torch.compile(classify) if compiled else classify

  def one():
    with torch.inference_mode():
      return predict(bank, labels, queries)

  interleave.serve(one, work=work(one().argmax(1)), version=torch.__version__)


if __name__ == '__main__':
  contestants.main(serve_vfm_jax, serve_torch)
