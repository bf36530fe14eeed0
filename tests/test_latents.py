import functools
import json
import pathlib
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from vfm_jax import config, convert_vae, latents, train, verbs
from vfm_jax.convert import ConversionError
from vfm_jax.data import latents as latents_lib
from vfm_jax.data import shards
from vfm_jax.evals.samples import draw_samples
from vfm_jax.models.autoencoder import AutoencoderKL

RECIPE = pathlib.Path(__file__).parent / 'recipes/tiny_latent.py'
TINY = AutoencoderKL(widths=(4, 8), layers=1, groups=4)


@pytest.fixture(scope='module')
def vae_folder(tmp_path_factory):
  """Write a random autoencoder as diffusers does."""
  folder = tmp_path_factory.mktemp('vae')
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda s: 0.3 * rng.standard_normal(s.shape, np.float32), TINY.template()
  )
  save_file(
    convert_vae.to_vae(params), folder / 'diffusion_pytorch_model.safetensors'
  )
  about = dict(
    block_out_channels=TINY.widths,
    layers_per_block=1,
    norm_num_groups=4,
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    down_block_types=['DownEncoderBlock2D'] * 2,
    up_block_types=['UpDecoderBlock2D'] * 2,
    scaling_factor=0.5,
    shift_factor=0.25,
  )
  (folder / 'config.json').write_text(json.dumps(about))
  return folder


def experiment(root, **overrides):
  c = config.load(f'{RECIPE}:{root}')
  c.update_from_flattened_dict(overrides)
  return config.build(c)


@pytest.fixture(scope='module')
def run(vae_folder, tmp_path_factory):
  """Write latents with the verb, twice, and return the work directory."""
  workdir = tmp_path_factory.mktemp('run')
  exp = experiment('')
  for name, number in (('run', 2), ('one', 1)):
    written = verbs.latents(
      exp,
      str(workdir / name),
      str(vae_folder),
      num_shards=number,
      dtype='float32' if number == 1 else 'float16',
    )
    assert written == {'train': 16}
  return workdir


def test_moments_are_those_of_the_pictures(run, vae_folder):
  source = latents_lib.Latents(str(run / 'one/latents/train'))
  vae = convert_vae.load(vae_folder)
  about = source.about
  assert about.shape == (4, 4, 4)
  assert (about.scaling, about.shift) == (0.5, 0.25)
  assert about.vae_sha256 == vae.sha256
  assert about.label_names == ('shape', 'direction')
  exp = experiment('')
  with exp.latents['train'].eval_batches(8) as batches:
    batch = next(batches)
  frames = batch['video'][:, 0].astype(np.float32) / 127.5 - 1
  encode = jax.jit(
    lambda x: vae.model.apply({'params': vae.params}, x, method='encode')
  )
  for view, x in enumerate((frames, frames[:, :, ::-1])):
    moments = encode(x)
    for i in range(8):
      name, labels, found = source[i]
      assert name == exp.latents['train'].source[i].id
      assert labels == {k: v[i] for k, v in batch['labels'].items()}
      np.testing.assert_allclose(
        found[view], [moments.mean[i], moments.std[i]], rtol=1e-4, atol=1e-4
      )


def test_shards_and_precision_change_nothing_else(run):
  one, two = (
    latents_lib.Latents(str(run / name / 'latents/train'))
    for name in ('one', 'run')
  )
  for i in range(16):
    assert one[i][:2] == two[i][:2]
    np.testing.assert_allclose(one[i][2], two[i][2], rtol=1e-3, atol=1e-6)


def test_clips_are_encoded_frame_by_frame(run, vae_folder, tmp_path):
  vae = convert_vae.load(vae_folder)
  c = config.load(f'{RECIPE}:')
  pipeline = c.latents.train
  pipeline.source.frames = pipeline.clip.frames = 3
  pipeline.source.count = 2
  manifest = latents.write_latents(
    vae,
    config.build(pipeline),
    tmp_path / 'clips',
    batch_size=2,
    flips=False,
  )
  assert manifest['shape'] == (3, 4, 4, 4)
  assert latents_lib.Latents(str(tmp_path / 'clips'))[1][2].shape == (
    1, 2, 3, 4, 4, 4,
  )  # fmt: skip


@pytest.mark.slow
def test_train_on_latents_and_sample_pictures(run, vae_folder, tmp_path):
  root = run / 'run/latents/train'
  exp = experiment(
    root, **{'objective.decoder.path': str(vae_folder), 'steps': 1}
  )
  train.train(exp, str(tmp_path))
  assert list((tmp_path / 'media').iterdir())
  written = verbs.sample(exp, str(tmp_path), count=3)
  with np.load(written['npz']) as file:
    assert file['arr_0'].shape == (3, 8, 8, 3)
    assert file['arr_0'].dtype == np.uint8


def test_pictures_need_a_decoder(run, vae_folder, tmp_path):
  overrides = {
    'objective.denoiser.depth': 1,
    'objective.denoiser.width': 16,
    'objective.sampling.scale': 1.0,
    'objective.decoder.path': str(vae_folder),
  }
  root = run / 'run/latents/train'
  exp = experiment(root, **overrides)
  params = jax.tree.map(
    lambda s: np.full(s.shape, 0.1, s.dtype),
    exp.abstract_state.params,
  )
  shape = exp.batch_spec['latent'].shape[1:]
  draw = functools.partial(
    draw_samples, params=params, shape=shape, labels=[0, 3], batch_size=2
  )
  assert draw(exp.objective, count=3).shape == (3, 1, 8, 8, 3)
  # The autoencoder is not part of what is trained and saved.
  assert params.keys() == {'denoiser'}
  bare = experiment(root, **{**overrides, 'objective.decoder.path': ''})
  with pytest.raises(ValueError, match=r'set `objective\.decoder` to ref\(Lat'):
    draw(bare.objective, count=3)
  # Training goes on without pictures.
  assert bare.objective.visualise(params, {}, {}, jax.random.key(0)) == {}
  # A folder that is missing is told before the first step.
  wrong = experiment(root, **{'objective.decoder.path': str(tmp_path / 'no')})
  with pytest.raises(ConversionError, match=r'expected a config\.json in'):
    train.train(wrong, str(tmp_path))


def test_decoder_undoes_the_scale(vae_folder):
  decoder = latents.LatentDecoder(str(vae_folder), batch=2)
  params = decoder.weights()
  z = np.random.default_rng(0).standard_normal((3, 2, 4, 4, 4), np.float32)
  out = jax.jit(decoder.decode)(params, z)
  assert out.shape == (3, 2, 8, 8, 3)
  decode = jax.jit(lambda z: TINY.apply({'params': params}, z, method='decode'))
  want = decode(z[2] / 0.5 + 0.25)
  np.testing.assert_allclose(out[2], want, rtol=1e-4, atol=1e-4)
  assert latents.LatentDecoder().weights() is None


def test_what_cannot_be_encoded(run, vae_folder, tmp_path):
  exp = experiment('')
  with pytest.raises(FileExistsError, match='train exists already'):
    verbs.latents(exp, str(run / 'one'), str(vae_folder))
  with pytest.raises(ConversionError, match=r'expected a config\.json in'):
    verbs.latents(exp, str(tmp_path), str(tmp_path))
  odd = experiment('', **{'latents.train.source.size': 9})
  with pytest.raises(
    ValueError, match=re.escape('sides 2 divides, found (9, 9, 3)')
  ):
    verbs.latents(odd, str(tmp_path), str(vae_folder))
  views = experiment('', **{'latents.train.views': 2})
  with pytest.raises(ValueError, match=r'latents\.train\.views: expected 1'):
    verbs.latents(views, str(tmp_path), str(vae_folder))
  c = config.load(f'{RECIPE}:')
  with c.unlocked():
    c.latents = config.config_dict.ConfigDict()
  with pytest.raises(ValueError, match=r'config\.latents is empty'):
    verbs.latents(config.build(c), str(tmp_path), str(vae_folder))
  assert not list(tmp_path.rglob(shards.MANIFEST))
