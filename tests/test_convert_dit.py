import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from vfm_jax import convert, convert_dit
from vfm_jax.models.dit import DiT
from vfm_jax.nn import transformer

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'a_dit_forward'
CONFIG = json.loads(GOLDEN.with_suffix('.json').read_text())['config']
MODEL = DiT(
  width=CONFIG['hidden_size'],
  depth=CONFIG['depth'],
  heads=CONFIG['num_heads'],
  patch=CONFIG['patch_size'],
  input_size=CONFIG['input_size'],
  num_classes=CONFIG['num_classes'],
)
DIFFUSERS = {
  'num_attention_heads': MODEL.heads,
  'attention_head_dim': MODEL.width // MODEL.heads,
  'in_channels': 4,
  'out_channels': 8,
  'num_layers': MODEL.depth,
  'sample_size': MODEL.input_size,
  'patch_size': MODEL.patch,
  'num_embeds_ada_norm': MODEL.num_classes,
  'norm_type': 'ada_norm_zero',
  'activation_fn': 'gelu-approximate',
}


@pytest.fixture(scope='module')
def state():
  with np.load(GOLDEN.with_suffix('.npz')) as file:
    return {k[2:]: file[k] for k in file.files if k.startswith('w/')}


def template(model=MODEL):
  x = jnp.zeros((1, model.frames, model.input_size, model.input_size, 4))
  make = lambda: model.init(jax.random.key(0), x, jnp.zeros(1))  # noqa: E731
  return jax.eval_shape(make)['params']


def diffusers(state):
  """Return a checkpoint under the names of diffusers."""
  out = {}
  for end in ('weight', 'bias'):
    out[f'pos_embed.proj.{end}'] = state[f'x_embedder.proj.{end}']
    out[f'proj_out_1.{end}'] = state[f'final_layer.adaLN_modulation.1.{end}']
    out[f'proj_out_2.{end}'] = state[f'final_layer.linear.{end}']
    for i in range(MODEL.depth):
      old, new = f'blocks.{i}', f'transformer_blocks.{i}'
      embed = f'{new}.norm1.emb'
      table = state['y_embedder.embedding_table.weight']
      out[f'{embed}.class_embedder.embedding_table.weight'] = table
      parts = np.split(state[f'{old}.attn.qkv.{end}'], 3)
      for name, part in zip('qkv', parts, strict=True):
        out[f'{new}.attn1.to_{name}.{end}'] = part
      for name, layer in {
        f'{embed}.timestep_embedder.linear_1': 't_embedder.mlp.0',
        f'{embed}.timestep_embedder.linear_2': 't_embedder.mlp.2',
        f'{new}.norm1.linear': f'{old}.adaLN_modulation.1',
        f'{new}.attn1.to_out.0': f'{old}.attn.proj',
        f'{new}.ff.net.0.proj': f'{old}.mlp.fc1',
        f'{new}.ff.net.2': f'{old}.mlp.fc2',
      }.items():
        out[f'{name}.{end}'] = state[f'{layer}.{end}']
  return out


def equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize('scan', [False, True])
def test_round_trip_is_exact(state, scan):
  model = MODEL.clone(scan=scan)
  params = convert_dit.from_dit(state, template(model))
  back = convert_dit.to_dit(params, model)
  assert back.keys() == state.keys()
  for name, tensor in state.items():
    assert back[name].flags.c_contiguous
    np.testing.assert_allclose(
      back[name], tensor, rtol=0, atol=1e-6 * (name == 'pos_embed')
    )


def test_places_of_entries(state):
  params = convert_dit.from_dit(state, template())
  stem = state['x_embedder.proj.weight']
  kernel = params['patch_embed']['kernel']
  at = (1 * 2 + 0) * 4 + 3  # row 1, column 0, channel 3
  np.testing.assert_array_equal(kernel[at], stem[:, 3, 1, 0])
  fused = state['blocks.1.attn.qkv.weight']
  qkv = params['blocks_1']['attn']['qkv']['kernel']
  np.testing.assert_array_equal(qkv[:, 2, 1, 5], fused[2 * 48 + 16 + 5])


def test_diffusers_folder(state, tmp_path):
  want = convert_dit.from_dit(state, template())
  tensors = {k: np.ascontiguousarray(v) for k, v in diffusers(state).items()}
  folder = tmp_path / 'transformer'
  folder.mkdir()
  with pytest.raises(convert.ConversionError, match=r'config\.json in'):
    convert_dit.read_diffusers(tmp_path)
  (folder / 'config.json').write_text(json.dumps(DIFFUSERS))
  with pytest.raises(convert.ConversionError, match=r'found \[.config\.json'):
    convert_dit.read_diffusers(folder)
  save_file(tensors, folder / 'diffusion_pytorch_model.safetensors')
  for path in (tmp_path, folder):
    model, read = convert_dit.read_diffusers(path)
    assert model == MODEL
    equal(convert_dit.from_dit(read, template(model)), want)
  other = {**DIFFUSERS, 'norm_type': 'ada_norm_single'}
  (folder / 'config.json').write_text(json.dumps(other))
  with pytest.raises(convert.ConversionError, match="'ada_norm_single'"):
    convert_dit.read_diffusers(folder)


def test_every_fault_is_named(state):
  faulty = dict(state)
  del faulty['blocks.0.attn.proj.bias']
  faulty['extra.weight'] = np.zeros((1, 2))
  faulty['blocks.1.mlp.fc3.weight'] = faulty.pop('blocks.1.mlp.fc2.weight')
  faulty['blocks.2.attn.qkv.weight'] = state['blocks.2.attn.qkv.weight'].T
  faulty['y_embedder.embedding_table.weight'] = np.zeros((10, 48))
  faulty['x_embedder.proj.weight'] = np.zeros((48, 16))
  with pytest.raises(convert.ConversionError) as e:
    convert_dit.from_dit(faulty, template())
  for text in (
    'missing: blocks.0.attn.proj.bias for blocks_0/attn/proj/bias',
    'unused: extra.weight (1, 2)',
    'missing: blocks.1.mlp.fc2.weight for blocks_1/mlp/fc2/kernel',
    'unused: blocks.1.mlp.fc3.weight',
    'reshaped: blocks.2.attn.qkv.weight is (48, 144)',
    'reshaped: y_embedder.embedding_table.weight is (10, 48)',
    'reshaped: x_embedder.proj.weight is (48, 16)',
  ):
    assert text in str(e.value)
  extra = {**state, 'extra.weight': np.zeros(1)}
  reasons = {r'extra\..*': 'a head of another task'}
  equal(
    convert_dit.from_dit(extra, template(), ignore=reasons),
    convert_dit.from_dit(state, template()),
  )


def test_faults_of_the_diffusers_layout(state):
  faulty = diffusers(state)
  del faulty['transformer_blocks.1.attn1.to_k.weight']
  with pytest.raises(
    convert.ConversionError, match=r'missing: \S*1\.attn1\.to_k\.weight'
  ):
    convert_dit.from_dit(faulty, template())
  faulty = diffusers(state)
  name = 'transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias'
  faulty[name] = faulty[name] + 1
  with pytest.raises(convert.ConversionError, match='only one embedder'):
    convert_dit.from_dit(faulty, template())


def test_positions_must_be_the_fixed_table(state):
  table = state['pos_embed']
  swapped = np.concatenate(np.split(table, 2, -1)[::-1], -1)
  for other in (swapped, table[:, :-1], table[0]):
    with pytest.raises(convert.ConversionError, match='fixed table'):
      convert_dit.from_dit({**state, 'pos_embed': other}, template())
  bare = {k: v for k, v in state.items() if k != 'pos_embed'}
  equal(
    convert_dit.from_dit(bare, template()),
    convert_dit.from_dit(state, template()),
  )


def test_videos_have_no_released_layout(state):
  model = MODEL.clone(frames=2, attention='factorised')
  with pytest.raises(
    convert.ConversionError, match=r'known for blocks_0/ada_time'
  ):
    convert_dit.from_dit(state, template(model))
  with pytest.raises(convert.ConversionError, match='models of images'):
    convert_dit.to_dit(template(model), model)


def test_stacked_and_unrolled_agree(state):
  stacked = convert_dit.from_dit(state, template(MODEL.clone(scan=True)))
  equal(
    transformer.unstack_blocks(stacked),
    convert_dit.from_dit(state, template()),
  )
