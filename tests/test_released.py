"""Check the released encoders: counts, and files of every layout."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax import config, convert, convert_umt, convert_vjepa, readers, trees
from vfm_jax.models.clip import ClipViT
from vfm_jax.models.encoders import VideoViT
from vfm_jax.models.predictors import PixelDecoder
from vfm_jax.nn import transformer
from vfm_jax.objectives.masked import Masked
from vfm_jax.released import ENCODERS

RECIPE = pathlib.Path(__file__).parents[1] / 'configs/encoders.py'
FAMILIES = ('videomaev2_g', 'videomaev2_b', 'vjepa_l', 'vjepa2_g', 'umt_b')
FAMILIES += ('videoprism_b', 'videoprism_lvt_b', 'clip_b')
# Of towers that no paper counts.
COUNTS = {'clip_l': 303_966_208, 'dfn_h': 632_076_800}


def count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def sized(released):
  objective = config.build(released.objective())
  shape = (1, released.frames, *(released.pixels,) * 2, 3)
  return objective, {'video': jax.ShapeDtypeStruct(shape, jnp.uint8)}


# One of each architecture by default.
@pytest.mark.parametrize(
  'name',
  [
    pytest.param(n, marks=[] if n in FAMILIES else pytest.mark.slow)
    for n in ENCODERS
  ],
)
def test_number_of_parameters(name):
  objective, batch = sized(ENCODERS[name])
  params, _ = jax.eval_shape(objective.init, jax.random.key(0), batch)
  assert count(params) == COUNTS.get(name, objective.num_params)


@pytest.mark.slow
@pytest.mark.parametrize('name', FAMILIES)
def test_tokens_and_embeddings(name):
  objective, batch = sized(ENCODERS[name])
  params, _ = jax.eval_shape(objective.init, jax.random.key(0), batch)
  tokens = jax.eval_shape(objective.tokens, params, batch)
  vectors = jax.eval_shape(objective.embed, params, batch)
  assert vectors.shape == (1, tokens.shape[-1])


# VideoMAE and VideoMAE V2 with their decoders.
@pytest.mark.parametrize(
  ('size', 'decoder', 'total'),
  [
    pytest.param(
      'S',
      dict(width=192, heads=3, depth=4),
      24_029_376,
      marks=pytest.mark.slow,
    ),
    ('B', dict(width=384, heads=6, depth=4), 94_210_944),
    pytest.param(
      'L',
      dict(width=512, heads=8, depth=12),
      342_996_992,
      marks=pytest.mark.slow,
    ),
    pytest.param(
      'H',
      dict(width=640, heads=8, depth=12),
      692_487_296,
      marks=pytest.mark.slow,
    ),
    pytest.param(
      'H',
      dict(width=512, heads=8, depth=4),
      645_659_392,
      marks=pytest.mark.slow,
    ),
    (
      'g',
      dict(width=512, heads=8, depth=4, mlp_ratio=48 / 11),
      1_026_306_560,
    ),
  ],
)
def test_number_of_parameters_in_pretraining(size, decoder, total):
  # A scanned stack is traced faster.
  objective = Masked(
    VideoViT(size=size, scan=True), PixelDecoder(**decoder, scan=True)
  )
  batch = {'video': jax.ShapeDtypeStruct((1, 16, 224, 224, 3), jnp.uint8)}
  params, _ = jax.eval_shape(objective.init, jax.random.key(0), batch)
  assert count(params) == total


def test_every_name_is_a_recipe():
  c = config.load(f'{RECIPE}:vjepa2_g')
  assert c.objective.num_params == 1_012_173_952
  assert c.embed.val.transform.size == 256
  assert not c.evals
  # The probes read their lists when they are built.
  with pytest.raises(config.ConfigError, match=r'evals\.probes: .*train\.csv'):
    config.build(config.load(f'{RECIPE}:clip_b-eval'))
  with pytest.raises(config.ConfigError, match="variant 'dino'"):
    config.load(f'{RECIPE}:dino')


TINY = dict(width=16, depth=2, heads=2, patch=8, frames=2, image_size=16)
VIT = VideoViT(**TINY)
TUNED = VideoViT(**TINY, pooling='mean', norm='pooled')
JEPA = VideoViT(**TINY, qkv_bias='full', positions='sincos_3d')
UMT = VideoViT(**TINY, tubelet=1)
CLIP = ClipViT(width=16, depth=2, heads=2, patch=8, features=8, image_size=16)


def released_sources(rules, template, hint, part='encoder/'):
  """Return random tensors under the names that the layout asks for."""
  flat = dict(trees.path_leaves(template))
  found = rules([part + path for path in flat], dict.fromkeys(hint))
  rng = np.random.default_rng(0)
  state = {}
  for path, source in found.items():
    shape = flat[path.removeprefix(part)].shape
    if path.endswith('patch_embed/kernel'):
      side = 8 if len(shape) == 2 else None
      frames = shape[0] // (3 * side * side)
      size = (shape[1], 3, frames, side, side)
    elif path.endswith('qkv/kernel'):
      size = (3 * shape[0] // len(source.names), shape[0])
    elif path.endswith('qkv/bias'):
      size = (np.prod(shape) // len(source.names),)
    else:
      kept = path.endswith('pos_embed') or path == 'proj/kernel'
      matrix = len(shape) == 2 and not kept
      size = shape[::-1] if matrix else shape
    for name in source.names:
      state[name] = rng.normal(size=size).astype('f')
  return state


FILES = {
  'videomae': (VIT, readers.videomae, convert.sources, ['encoder.x']),
  'videomae-tuned': (TUNED, readers.videomae, convert.sources, []),
  'videomae-transformers': (
    *(VIT, readers.videomae, convert.sources),
    ['videomae.encoder'],
  ),
  'vjepa': (JEPA, readers.vjepa, convert_vjepa.sources, []),
  'vjepa-transformers': (
    *(JEPA, readers.vjepa, convert_vjepa.sources),
    ['encoder.embeddings.patch_embeddings.proj.weight'],
  ),
  'umt': (UMT, readers.umt, convert_umt.sources, ['encoder.x']),
  'clip': (CLIP, readers.clip, convert_umt._clip_sources, []),
}
# What a file of pretraining holds beside the encoder.
BESIDE = {
  'videomae': 'decoder.norm.weight',
  'videomae-tuned': 'head.weight',
  'videomae-transformers': 'decoder.head.bias',
  'vjepa': 'predictor.norm.weight',
  'vjepa-transformers': 'predictor.proj.weight',
  'umt': 'clip_decoder.0.head.weight',
  'clip': 'x.position_ids',
}


@pytest.fixture(scope='module', params=FILES)
def file(request):
  model, reader, rules, hint = FILES[request.param]
  video = jax.ShapeDtypeStruct((1, 2, 16, 16, 3), jnp.float32)
  init = jax.eval_shape(model.init, jax.random.key(0), video)
  template = init['params']
  part = '' if model is CLIP else 'encoder/'
  state = released_sources(rules, template, hint, part)
  state[BESIDE[request.param]] = np.zeros(3, np.float32)
  return reader, state, template, model


def read(file, state):
  reader, _, template, model = file
  return reader(state, template, model)


def test_files_are_read_in_full(file):
  _, state, template, _ = file
  with convert.recorded() as usage:
    params = read(file, state)
  shapes = jax.tree.map(lambda x: x.shape, template)
  assert jax.tree.map(np.shape, params) == shapes
  assert usage.used | usage.left_out.keys() == set(state)
  assert len(usage.left_out) == 1


def test_missing_extra_renamed_and_reshaped_tensors_are_named(file):
  state = dict(file[1])
  lost = next(n for n in state if re.search(r'(norm|ln_)\w*\.bias$', n))
  del state[lost]
  names = [n for n in state if 'fc1' in n or 'c_fc' in n or 'intermed' in n]
  renamed = names[0]
  state[f'{renamed}_'] = state.pop(renamed)
  state[names[-1]] = state[names[-1]][:-1]
  state['rotary.inv_freq'] = np.zeros(4)
  with pytest.raises(convert.ConversionError) as e:
    read(file, state)
  text = str(e.value)
  assert f'missing: {lost}' in text
  assert f'missing: {renamed} for' in text
  assert f'unused: {renamed}_' in text
  assert f'reshaped: {names[-1]}' in text
  assert 'unused: rotary.inv_freq (4,)' in text


def test_no_bias_of_q_or_v_is_dropped(file):
  reader, state, template, model = file
  bias = next(
    n
    for n in state
    if n.endswith(('v_bias', 'value.bias', 'qkv.bias', 'in_proj_bias'))
  )
  without = {n: x for n, x in state.items() if n != bias}
  with pytest.raises(convert.ConversionError, match=f'missing: .*{bias} for'):
    reader(without, template, model)
  flat = dict(trees.path_leaves(template))
  kept = [p for p in flat if not p.endswith(('v_bias', 'qkv/bias'))]
  bare = transformer.unstack_blocks(template)
  bare = trees.map_with_path(lambda p, x: x if p in kept else None, bare)
  with pytest.raises(convert.ConversionError, match=f'unused: {bias}'):
    reader(state, _pruned(bare), model)


def _pruned(tree):
  return {
    k: _pruned(v) if isinstance(v, dict) else v
    for k, v in tree.items()
    if v is not None
  }
