"""Check every recipe: its recorded text, its description, two steps of it."""

import dataclasses
import pathlib
import re

import jax
import numpy as np
import pytest

from vfm_jax import config, sharding, trees, verbs
from vfm_jax.data import latents
from vfm_jax.data.latent_pipeline import LatentPipeline
from vfm_jax.data.mixed import Mixed
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.data.synthetic import MovingShapes
from vfm_jax.nn.mixer import Mixing

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / 'tests/golden/configs'
VARIANTS = {
  'videomae_b': ('', 'gpu8', 'gpu1'),
  'videomae_l': ('', 'gpu8', 'gpu1'),
  'videomaev2_g': ('', 'gpu8'),
  'vjepa_l': ('', 'gpu8', 'h'),
  'vjepa2_l': ('', 'h', 'g', 'long', 'h-long', 'g-long'),
  'finetune_videomae_b': ('', 'gpu1', 'lora'),
  'twlv_b': ('', 'gpu8', 'gpu1'),
  'twlv_l': ('', 'gpu8', 'gpu1'),
  'umt_b': ('', 'gpu8', 'gpu1'),
  'umt_l': ('', 'gpu8', 'gpu1'),
  'quickstart': ('', 'mocap'),
  'pretraining_mocap': ('untrained', 'pixels', 'vjepa', 'umt', 'twlv'),
  # Sets those side by side.
  'study_pretraining': (),
  'film_shots': ('', 'random'),
  'film_heads': ('', 'random'),
  'eval_store': ('', 'multi-clip', 'flat', 'maps'),
  'tal_thumos': ('', 'external'),
  'tal_anet': ('', 'external'),
  'tas': ('', '50salads', 'gtea', 'breakfast'),
  'quickstart_diffusion': ('', 'flow', 'measure', 'flow-measure'),
  'video_dit_quickstart': ('', 'joint'),
  'dit_s2': ('', 'gpu8', 'gpu1', '7m', 'min_snr', '7m-p2-gpu8'),
  'dit_b2': ('',),
  'dit_l2': ('', 'gpu1'),
  'dit_xl2': ('', '7m-gpu8', 'gpu1'),
  'sit_xl2': ('', '7m-gpu8', 'gpu1'),
  'meme_ffhq': ('', 'same'),
  'dmp_ffhq': ('', 'pt', 'ft'),
  'methods_digits': (
    'dit',
    'dtr',
    'switch',
    'ant_uw',
    'ant_pcgrad',
    'ant_nash',
    'dmp',
    'ft',
    'curriculum',
    'anti_curriculum',
    'meme',
  ),
  # Sets those side by side.
  'study_digits': (),
  'analysis_digits': ('dit', 'switch'),
  'transfer_digits': ('together', 'alone_0'),
  'encoders': (
    'videomae_b',
    'videomaev2_b',
    'vjepa2_g',
    'umt_b',
    'videoprism_lvt_b',
    'clip_b-eval',
  ),
  'dtr_l2': ('', 'random', 'min_snr', 'uw', 'uw-gpu1'),
  'switch_dit': (
    '',
    'b2',
    'l2-gpu1',
    'xl2',
    'uw',
    's2-ffhq',
    'b2-uw-ffhq-gpu8',
  ),
  'ant_l2': ('', 'nash-snr-gpu1'),
  'ant_s2': ('', 'pcgrad', 'nash', 'snr'),
  'curriculum_dit': (
    '',
    'anti',
    'none',
    'snr',
    'flow',
    'logit',
    'anti-flow-gpu8',
  ),
  'combinations': (
    'dtr_uw',
    'switch_curriculum',
    'dmp_switch',
    'pcgrad_dtr_flow',
    'ant_video',
  ),
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
  'name',
  [
    'videomae_b',
    pytest.param('videomae_l', marks=pytest.mark.slow),
    pytest.param('videomaev2_g', marks=pytest.mark.slow),
  ],
)
def test_describe_on_a_laptop_without_the_videos(name):
  described = verbs.describe(config.build(load(name)), DEVICES[''])
  assert described.data['num_params'] > 9e7
  assert described.data['flops_per_step'] > 2e14
  assert described.data['devices'] == 256


# The quickstarts and the notebook take such steps without this mark.
@pytest.mark.slow
@pytest.mark.parametrize('name', ['videomae_b', 'videomae_l', 'videomaev2_g'])
def test_two_smoke_steps(name):
  check_two_steps(config.build(smoke(load(name))))


@pytest.mark.parametrize(
  ('spec', 'encoder', 'predictor'),
  [
    ('vjepa_l', 303_885_312, 22_082_944),
    pytest.param('vjepa_l:h', 631_648_000, 22_279_808, marks=pytest.mark.slow),
    pytest.param('vjepa2_l', 303_885_312, 22_086_016, marks=pytest.mark.slow),
    pytest.param(
      'vjepa2_l:g-long', 1_012_173_952, 22_381_312, marks=pytest.mark.slow
    ),
  ],
)
def test_latent_recipes_have_the_released_parameters(spec, encoder, predictor):
  described = verbs.describe(config.build(load(spec)), DEVICES['']).data
  for part, want in (('encoder', encoder), ('predictor', predictor)):
    rows = [p for p in described['parameters'] if p['path'].startswith(part)]
    assert sum(p['count'] for p in rows) == want


@pytest.mark.slow
@pytest.mark.parametrize('name', ['vjepa_l', 'vjepa2_l'])
def test_two_smoke_steps_of_latent_recipes(name):
  c = load(name)
  small = dict(width=32, depth=2, heads=2)
  c.objective.encoder.update(patch=8, frames=4, image_size=32, **small)
  c.objective.predictor.update(width=16, depth=1, heads=2)
  c.data.train.unlock()
  c.data.train.source = config.ref(MovingShapes, count=32, frames=8, size=40)
  c.data.train.clip.update(frames=4, stride=1, rate=None)
  c.data.train.transform.transforms[0].size = 32
  c.data.workers = 0
  c.update(batch_size=8, accum=2, steps=2)
  c.optim.lr.schedule.warmup_steps = 1
  c.mesh.update(data=-1, fsdp=4)
  check_two_steps(config.build(c))


# The counts of the released students; encoders of the sizes that TWLV-I states.
@pytest.mark.parametrize(
  ('name', 'encoder', 'heads'),
  [
    ('umt_b', 85_637_376, 2_368_512),
    pytest.param('umt_l', 303_074_304, 4_732_416, marks=pytest.mark.slow),
    pytest.param('twlv_b', 86_227_200, 2_368_512, marks=pytest.mark.slow),
    pytest.param('twlv_l', 303_860_736, 4_732_416, marks=pytest.mark.slow),
  ],
)
def test_distilling_recipes_need_no_teacher_to_describe(name, encoder, heads):
  described = verbs.describe(config.build(load(name)), DEVICES['']).data
  for part, want in (('encoder', encoder), ('heads', heads)):
    rows = [p for p in described['parameters'] if p['path'].startswith(part)]
    assert sum(p['count'] for p in rows) == want
  # Not of the state, and on every device.
  assert described['bytes_per_device']['teachers'] > 4e7
  assert not any('teacher' in p['path'] for p in described['parameters'])
  with pytest.raises(FileNotFoundError, match='weights/clip_vit'):
    config.build(load(name)).objective.teachers()


def smoke_distill(c):
  """Shrink a recipe with a teacher, whose weights become random."""
  o = c.objective
  small = dict(width=32, depth=2, heads=2, patch=8, image_size=32)
  o.encoder.update(frames=4, **small)
  o.teacher.model.update(features=16, **small)
  o.teacher.update(path='', seed=0, taps=(-1,))
  o.taps = (-1,)
  if 'predictor' in o:
    o.predictor.update(width=16, depth=1, heads=2)
  c.data.train.unlock()
  mixed = 'pipelines' in c.data.train
  pipelines = c.data.train.pipelines if mixed else (c.data.train,)
  for pipeline, frames in zip(pipelines, (4, 1), strict=False):
    source = config.ref(MovingShapes, count=32, frames=8, size=40)
    pipeline.source = source
    pipeline.clip.frames = frames
    for transform in pipeline.transform.get(
      'transforms', (pipeline.transform,)
    ):
      if 'size' in transform:
        transform.size = 32
  c.data.workers = 0
  c.update(batch_size=8, accum=2, steps=2)
  c.mesh.update(data=-1, fsdp=4)
  return c


@pytest.mark.slow
@pytest.mark.parametrize('name', ['umt_b', 'twlv_b'])
def test_distilling_recipes_in_small(name):
  c = smoke_distill(load(name))
  if name == 'twlv_b':
    # A step of videos, one of images.
    c.data.train.turns = (1, 1)
  check_two_steps(config.build(c))


@pytest.mark.slow
@pytest.mark.parametrize('method', ['pixels', 'vjepa', 'umt', 'twlv'])
def test_pretraining_methods_in_small(method):
  c = load(f'pretraining_mocap:{method}')
  for side in ('train', 'val'):
    shapes = config.ref(MovingShapes, count=32, frames=8, size=32)
    c.data[side].source = shapes
  c.evals = {}
  c.objective.encoder.update(width=24, depth=1, heads=2)
  c.update(batch_size=8)
  check_two_steps(config.build(c))


@pytest.mark.parametrize(
  'variant', ['', pytest.param('flow', marks=pytest.mark.slow)]
)
def test_diffusion_quickstart_in_small(variant):
  c = load(f'quickstart_diffusion:{variant}')
  assert verbs.describe(config.build(c), 8).data['devices'] == 8
  c.objective.denoiser.update(width=16, depth=1, heads=2)
  c.update(batch_size=8)
  check_two_steps(config.build(c))


@pytest.mark.slow
@pytest.mark.parametrize('variant', ['', 'joint'])
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
    for i in range(40):
      moments = rng.random(about.record_shape, np.float32)
      writer.write(f'{i}', {'label': i % 3}, moments)
    writer.finish()
  return str(root)


# Parameters in millions, and TFLOP of an example's step (arXiv:2212.09748,
# table 4, times three).
@pytest.mark.parametrize(
  ('spec', 'params', 'flops'),
  [
    ('dit_s2', 32.9, 0.0363),
    pytest.param('dit_s2:min_snr', 32.9, 0.0363, marks=pytest.mark.slow),
    pytest.param('dit_b2', 130.3, 0.138, marks=pytest.mark.slow),
    pytest.param('dit_l2', 457.8, 0.484, marks=pytest.mark.slow),
    pytest.param('dit_xl2', 674.8, 0.712, marks=pytest.mark.slow),
    pytest.param('sit_xl2', 674.8, 0.712, marks=pytest.mark.slow),
  ],
)
def test_latent_recipes_are_as_published(spec, params, flops):
  # Without the latents.
  described = verbs.describe(config.build(load(spec)), DEVICES['']).data
  assert described['num_params'] / 1e6 == pytest.approx(params, abs=0.1)
  assert described['flops_per_step'] / 256e12 == pytest.approx(flops, rel=0.01)
  assert described['devices'] == 256


# As above.
@pytest.mark.slow
@pytest.mark.parametrize(
  'spec', ['dit_s2', 'dit_s2:min_snr', 'dit_b2', 'dit_l2', 'dit_xl2', 'sit_xl2']
)
def test_two_smoke_steps_of_latents(spec, latent_set):
  c = load(spec)
  c.objective.denoiser.update(width=32, depth=2, heads=2, input_size=8)
  c.data.train.source.root = latent_set
  c.data.train.shape = (8, 8, 4)
  c.data.workers = 0
  c.update(batch_size=8, accum=2, steps=2)
  c.mesh.fsdp = 4
  check_two_steps(config.build(c))


# Trainable parameters: 12 layers of 256 prompts of 768, the gate, its noise.
@pytest.mark.slow
@pytest.mark.parametrize(
  ('variant', 'trainable'),
  [
    ('', 12 * 256 * 768 + 769 * 256 + 256 + 768 * 256),
    ('pt', 12 * 256 * 768),
    ('ft', None),
  ],
)
def test_prompts_recipe(variant, trainable, latent_set):
  c = load(f'dmp_ffhq:{variant}')
  described = verbs.describe(config.build(c), 8).data
  assert described['num_trainable'] == (trainable or described['num_params'])

  c.objective.denoiser.update(width=32, depth=2, heads=2, input_size=8)
  if variant != 'ft':
    c.objective.denoiser.hooks.count = 16
  c.data.train.source.root = latent_set
  c.data.train.update(shape=(8, 8, 4), labels=('label',))
  c.data.workers = 0
  c.update(batch_size=8, accum=2, steps=2)
  check_two_steps(dataclasses.replace(config.build(c), warm_start=None))


def test_latents_must_be_those_of_the_network():
  roots = set()
  for spec, shape in (('dmp_ffhq', (32, 32, 4)), ('meme_ffhq', (64, 64, 3))):
    c = load(spec)
    assert c.data.train.shape == shape
    roots.add(c.data.train.source.root)
  assert len(roots) == 2
  c = load('dmp_ffhq')
  c.data.train.shape = (64, 64, 3)
  message = (
    r'4 channels \(`objective.denoiser.channels`\), found shape '
    r'\(1, 64, 64, 3\).*`data.train`.*`source` and `shape`'
  )
  with pytest.raises(ValueError, match=message):
    verbs.describe(config.build(c), 8)


@pytest.mark.slow
@pytest.mark.parametrize('variant', ['', 'same'])
def test_experts_recipe(variant):
  c = load(f'meme_ffhq:{variant}')
  described = verbs.describe(config.build(c), 8).data
  # In millions: LDM-S is 89.5; MEME's experts 82.9, ours more.
  want = 349.3 if not variant else 358.2
  assert described['num_params'] / 1e6 == pytest.approx(want, abs=0.2)
  assert described['devices'] == 8


@pytest.mark.slow
@pytest.mark.parametrize('variant', ['', 'same'])
def test_experts_recipe_in_small(variant, latent_set):
  c = load(f'meme_ffhq:{variant}')
  # One stage, with a mixer between the two ways.
  small = dict(width=8, multipliers=(1,), blocks=1, spatial=(), groups=4)
  for expert in c.objective.experts:
    expert.denoiser.update(**small, channels=4, head_dim=4)
    if variant == 'same':
      continue
    expert.denoiser.unlock()
    expert.denoiser.mixing = config.ref(
      Mixing, shares=(0.5,), pools=(2,), head_dim=4
    )
  c.data.train.source.root = latent_set
  c.data.train.update(shape=(8, 8, 4), labels=('label',))
  c.data.workers = 0
  c.update(batch_size=8, steps=2)
  check_two_steps(config.build(c))


# As above. Routing is free; a block's experts are 3 matrices and a gate. The
# weights of tasks are a number each.
MULTITASK = [
  ('dtr_l2', 457.8),
  ('dtr_l2:random', 457.8),
  ('dtr_l2:uw', 457.8),
  ('switch_dit', 32.9 + 5.34),
  ('switch_dit:b2-uw', 130.3 + 21.3),
  ('switch_dit:xl2', 674.8 + 111.7),
  ('switch_dit:s2-ffhq', 32.57 + 5.34),
  ('ant_l2', 457.8),
  ('ant_s2:pcgrad', 32.9),
  ('ant_s2:nash-snr', 32.9),
  ('curriculum_dit', 130.3),
  ('curriculum_dit:anti-flow', 130.3),
  ('curriculum_dit:logit', 130.3),
]


@pytest.mark.slow
@pytest.mark.parametrize(
  ('spec', 'params'), MULTITASK, ids=[spec for spec, _ in MULTITASK]
)
def test_multitask_recipes(spec, params, latent_set):
  c = load(spec)
  # The batch of `ant_s2` divides by 2, the parameters of XL are cut by 8.
  described = verbs.describe(config.build(c), 8 if 'xl2' in spec else 2).data
  assert described['num_params'] / 1e6 == pytest.approx(params, abs=0.1)

  c.objective.denoiser.update(width=32, depth=2, heads=2, input_size=8)
  c.data.train.source.root = latent_set
  c.data.train.update(shape=(8, 8, 4), labels=('label',))
  c.data.workers = 0
  # Each task has examples.
  c.update(batch_size=40, steps=2)
  check_two_steps(config.build(c))


@pytest.mark.parametrize(
  'variant',
  [
    'dtr_uw',
    pytest.param('switch_curriculum', marks=pytest.mark.slow),
    pytest.param('dmp_switch', marks=pytest.mark.slow),
    pytest.param('pcgrad_dtr_flow', marks=pytest.mark.slow),
    pytest.param('ant_video', marks=pytest.mark.slow),
  ],
)
def test_combinations_in_small(variant):
  c = load(f'combinations:{variant}')
  config.build(c)
  c.objective.denoiser.update(width=16, depth=1, heads=2)
  if variant == 'ant_video':
    c.data.train.source.windows = 2
  c.update(batch_size=8)
  check_two_steps(dataclasses.replace(config.build(c), warm_start=None))


@pytest.mark.slow
def test_prompts_patch_what_the_combination_before_saved(tmp_path):
  base, patch = (
    load(f'combinations:{name}') for name in ('switch_curriculum', 'dmp_switch')
  )
  for c in (base, patch):
    c.objective.denoiser.update(width=16, depth=2, heads=2)
  base = config.build(base)
  first = base.first_state(base.shardings(sharding.make_mesh(base.mesh)))
  with base.checkpointer(str(tmp_path)) as saved:
    saved.save(0, first, force=True)
  patch.warm_start.workdir = str(tmp_path)
  patch = config.build(patch)
  state = patch.first_state(patch.shardings(sharding.make_mesh(patch.mesh)))
  old, new = (
    dict(trees.path_leaves(x)) for x in (first.ema['0.995'], state.params)
  )
  for path, x in old.items():
    np.testing.assert_array_equal(x, new[path])
  rows = {r.path for r in patch.optimizer[1] if not r.frozen}
  assert rows == new.keys() - old.keys()


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
  assert isinstance(exp.data.train, Pipeline | LatentPipeline | Mixed)
  mesh = sharding.make_mesh(exp.mesh)
  shardings = exp.shardings(mesh)
  with sharding.activations(mesh):
    state = exp.first_state(shardings)
    teachers = exp.teachers(mesh)
    step = jax.jit(exp.train_step(), out_shardings=(shardings, None))
    with exp.data.train.train_batches(exp.batch_size, seed=0) as batches:
      for _ in range(2):
        batch = sharding.put_batch(next(batches), mesh)
        state, metrics = step(state, batch, teachers)
  assert int(state.step) == 2
  assert np.isfinite(metrics['loss'])
