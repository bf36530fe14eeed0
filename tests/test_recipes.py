"""Check every recipe: its recorded text, its description, two steps of it."""

import pathlib
import re

import jax
import numpy as np
import pytest

from vfm_jax import config, sharding, verbs
from vfm_jax.data import latents
from vfm_jax.data.latent_pipeline import LatentPipeline
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.data.synthetic import MovingShapes

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / 'tests/golden/configs'
VARIANTS = {
  'videomae_b': ('', 'gpu8', 'gpu1'),
  'videomae_l': ('', 'gpu8', 'gpu1'),
  'videomaev2_g': ('', 'gpu8'),
  'twlv_b': ('', 'gpu8', 'gpu1'),
  'twlv_l': ('', 'gpu8', 'gpu1'),
  'quickstart': ('', 'mocap'),
  'quickstart_diffusion': ('', 'flow', 'measure', 'flow-measure'),
  'video_dit_quickstart': ('', 'joint'),
  'dit_s2': ('', 'gpu8', 'gpu1', '7m', 'min_snr', '7m-p2-gpu8'),
  'dit_b2': ('',),
  'dit_l2': ('', 'gpu1'),
  'dit_xl2': ('', '7m-gpu8', 'gpu1'),
  'sit_xl2': ('', '7m-gpu8', 'gpu1'),
}
SPECS = [
  f'{name}:{v}' if v else name for name, vs in VARIANTS.items() for v in vs
]
# Devices of a pod slice that the variant without a name is laid out for.
DEVICES = {'': 256, 'gpu8': 8, 'gpu1': 1}


def load(spec):
  name, _, variant = spec.partition(':')
  return config.load(f'{ROOT}/configs/{name}.py:{variant}')


def test_every_recipe_is_listed():
  assert {p.stem for p in (ROOT / 'configs').glob('*.py')} == set(VARIANTS)


@pytest.mark.parametrize('spec', SPECS)
def test_text_is_as_recorded(spec, request):
  """A changed default or recipe shows as a diff of these files."""
  path = GOLDEN / f'{spec.replace(":", "-")}.txt'
  text = config.to_text(load(spec))
  if request.config.getoption('--update-golden'):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
  assert text == path.read_text()


@pytest.mark.parametrize('name', VARIANTS)
def test_recipe_is_short_and_says_how_far_it_was_run(name):
  source = (ROOT / 'configs' / f'{name}.py').read_text()
  assert len(source.splitlines()) < 100
  assert re.search(r'python -m vfm_jax.main|quickstart.sh', source)
  assert re.search(r'Ours: ', source)


def smoke(c):
  """Shrink a recipe to a model that runs two steps in seconds."""
  encoder, decoder = c.objective.encoder, c.objective.decoder
  encoder.update(width=32, depth=2, heads=2, patch=8, frames=4, image_size=32)
  decoder.update(width=16, depth=1, heads=2)
  c.data.train.unlock()
  c.data.train.source = config.ref(MovingShapes, count=32, frames=8, size=40)
  c.data.train.clip.update(frames=4, stride=1)
  c.data.train.transform.size = 32
  c.data.workers = 0
  c.update(batch_size=8, accum=2, steps=2)
  c.mesh.update(data=-1, fsdp=4)
  return c


@pytest.mark.parametrize(
  'name', [n for n in VARIANTS if n.startswith(('videomae', 'twlv'))]
)
def test_describe_and_two_smoke_steps(name):
  # On a laptop without the videos.
  described = verbs.describe(config.build(load(name)), DEVICES[''])
  assert described.data['num_params'] > 9e7
  assert described.data['flops_per_step'] > 2e14
  assert described.data['devices'] == 256

  check_two_steps(config.build(smoke(load(name))))


@pytest.mark.parametrize('variant', ['', 'flow'])
def test_diffusion_quickstart_in_small(variant):
  c = load(f'quickstart_diffusion:{variant}')
  assert verbs.describe(config.build(c), 8).data['devices'] == 8
  c.objective.denoiser.update(width=16, depth=1, heads=2)
  c.update(batch_size=8)
  check_two_steps(config.build(c))


@pytest.mark.parametrize(
  'variant', ['', pytest.param('joint', marks=pytest.mark.slow)]
)
def test_video_quickstart_in_small(variant):
  c = load(f'video_dit_quickstart:{variant}')
  assert verbs.describe(config.build(c), 8).data['devices'] == 8
  c.objective.denoiser.update(width=16, depth=1, heads=2)
  c.data.train.source.windows = 2
  c.update(batch_size=8)
  check_two_steps(config.build(c))


@pytest.fixture(scope='module')
def latent_set(tmp_path_factory):
  root = tmp_path_factory.mktemp('sets') / 'train'
  about = latents.About(
    shape=(8, 8, 4),
    dtype='float16',
    flips=True,
    scaling=0.18215,
    shift=0.0,
    vae_sha256='0' * 64,
    label_names=('label',),
  )
  rng = np.random.default_rng(0)
  with latents.LatentWriter(root, about) as writer:
    for i in range(16):
      moments = rng.random(about.record_shape, np.float32)
      writer.write(f'{i}', {'label': i % 3}, moments)
    writer.finish()
  return str(root)


# Parameters in millions, and TFLOP of an example's step (arXiv:2212.09748,
# table 4, times three).
@pytest.mark.parametrize(
  ('spec', 'params', 'flops'),
  [
    pytest.param('dit_s2', 32.9, 0.0363, marks=pytest.mark.slow),
    pytest.param('dit_s2:min_snr', 32.9, 0.0363, marks=pytest.mark.slow),
    pytest.param('dit_b2', 130.3, 0.138, marks=pytest.mark.slow),
    pytest.param('dit_l2', 457.8, 0.484, marks=pytest.mark.slow),
    ('dit_xl2', 674.8, 0.712),
    pytest.param('sit_xl2', 674.8, 0.712, marks=pytest.mark.slow),
  ],
)
def test_latent_recipes(spec, params, flops, latent_set):
  c = load(spec)
  # Without the latents.
  described = verbs.describe(config.build(c), DEVICES['']).data
  assert described['num_params'] / 1e6 == pytest.approx(params, abs=0.1)
  assert described['flops_per_step'] / 256e12 == pytest.approx(flops, rel=0.01)
  assert described['devices'] == 256

  c.objective.denoiser.update(width=32, depth=2, heads=2, input_size=8)
  c.data.train.source.root = latent_set
  c.data.train.shape = (8, 8, 4)
  c.data.workers = 0
  c.update(batch_size=8, accum=2, steps=2)
  c.mesh.fsdp = 4
  check_two_steps(config.build(c))


def test_variants_of_latent_recipes():
  short, long = (config.build(load(f'dit_s2:{v}')) for v in ('', '7m-p2-gpu8'))
  assert (short.steps, long.steps) == (400_000, 7_000_000)
  snr = np.array([0.5, 20.0])
  weights = {
    v: config.build(load(f'dit_s2:{v}')).objective.process.weight(snr, 'eps')
    for v in ('', 'min_snr', 'p2')
  }
  np.testing.assert_allclose(weights[''], [1, 1])
  np.testing.assert_allclose(weights['min_snr'], [1, 5 / 20])
  np.testing.assert_allclose(weights['p2'], [1 / 1.5, 1 / 21])
  with pytest.raises(config.ConfigError, match="':min_snr-gpu8'"):
    load('dit_s2:gpu8-min_snr')
  with pytest.raises(config.ConfigError, match="variant 'min_snr'"):
    load('sit_xl2:min_snr')


def check_two_steps(exp):
  assert isinstance(exp.data.train, Pipeline | LatentPipeline)
  mesh = sharding.make_mesh(exp.mesh)
  shardings = exp.shardings(mesh)
  with sharding.activations(mesh):
    state = exp.first_state(shardings)
    step = jax.jit(exp.train_step(), out_shardings=(shardings, None))
    with exp.data.train.train_batches(exp.batch_size, seed=0) as batches:
      for _ in range(2):
        state, metrics = step(state, sharding.put_batch(next(batches), mesh))
  assert int(state.step) == 2
  assert np.isfinite(metrics['loss'])
