import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax import convert, convert_umt
from vfm_jax.models.clip import ClipViT
from vfm_jax.models.encoders import VideoViT
from vfm_jax.nn import transformer
from vfm_jax.ops import positions

GOLDEN = pathlib.Path(__file__).parent / 'golden'
TOWER = ClipViT(width=48, depth=3, heads=4, patch=8, features=40, image_size=32)
STUDENT = VideoViT(
  width=48, depth=3, heads=4, patch=8, tubelet=1, frames=4, image_size=32
)


def shapes(model, frames=1):
  video = jax.ShapeDtypeStruct((1, frames, 32, 32, 3), jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), video)['params']


@pytest.fixture(scope='module')
def arrays():
  with np.load(GOLDEN / 'e_umt_step.npz') as file:
    return dict(file)


def part(arrays, prefix):
  return {
    k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)
  }


@pytest.fixture(scope='module')
def tower(arrays):
  return part(arrays, 'w/teacher.')


@pytest.fixture(scope='module')
def student(arrays):
  return part(arrays, 'w/student.')


def test_tower_by_itself_in_two_dimensions_and_beside_the_text(tower):
  want = convert_umt.from_clip(tower, shapes(TOWER))
  weight = tower['conv1.weight']
  kernel = want['patch_embed']['kernel']
  np.testing.assert_array_equal(
    kernel[(3 * 8 + 5) * 3 + 2], weight[:, 2, 0, 3, 5]
  )
  np.testing.assert_array_equal(want['proj']['kernel'], tower['proj'])
  flat = {**tower, 'conv1.weight': weight[:, :, 0]}
  whole = {f'visual.{k}': v for k, v in flat.items()}
  whole |= {
    'transformer.resblocks.0.ln_1.weight': np.zeros(8),
    'token_embedding.weight': np.zeros((9, 8)),
    'positional_embedding': np.zeros((7, 8)),
    'text_projection': np.zeros((8, 8)),
    'logit_scale': np.zeros(()),
  }
  for state in (flat, whole):
    got = convert_umt.from_clip(state, shapes(TOWER))
    jax.tree.map(np.testing.assert_array_equal, got, want)
  scanned = convert_umt.from_clip(tower, shapes(TOWER.clone(scan=True)))
  got = transformer.unstack_blocks(scanned)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_every_tensor_of_a_tower_that_does_not_fit_is_named(tower):
  state = {k: v for k, v in tower.items() if 'in_proj_bias' not in k}
  state['ln_post.weight'] = np.zeros(47)
  state['transformer.resblocks.0.attn.k_bias'] = np.zeros(48)
  state['token_embedding.weight'] = np.zeros((9, 8))
  del state['ln_pre.bias']
  state['ln_pre.shift'] = np.zeros(48)
  with pytest.raises(convert.ConversionError) as e:
    convert_umt.from_clip(state, shapes(TOWER))
  text = str(e.value)
  assert 'missing: transformer.resblocks.1.attn.in_proj_bias' in text
  assert 'reshaped: ln_post.weight is (47,)' in text
  assert 'unused: transformer.resblocks.0.attn.k_bias' in text
  # Without the names of a whole model, nothing is known to be text.
  assert 'unused: token_embedding.weight' in text
  assert 'missing: ln_pre.bias' in text
  assert 'unused: ln_pre.shift' in text


def test_student_with_and_without_heads(student):
  encoder = {'encoder': shapes(STUDENT, 4)}
  got = convert_umt.from_umt(student, encoder, encoder=STUDENT)
  block = got['encoder']['blocks_1']['attn']
  np.testing.assert_array_equal(
    block['v_bias'], student['encoder.blocks.1.attn.v_bias']
  )
  head = {
    'head_0': {'kernel': jnp.zeros((48, 40)), 'bias': jnp.zeros(40)},
    'norm_0': {'scale': jnp.zeros(40), 'bias': jnp.zeros(40)},
  }
  # The template has one head, the file two.
  with pytest.raises(convert.ConversionError, match=r'unused: clip_decoder\.1'):
    convert_umt.from_umt(student, {**encoder, 'heads': head}, encoder=STUDENT)
  only = {k: v for k, v in student.items() if 'clip_decoder.1' not in k}
  got = convert_umt.from_umt(only, {**encoder, 'heads': head}, encoder=STUDENT)
  np.testing.assert_array_equal(
    got['heads']['head_0']['kernel'], student['clip_decoder.0.head.weight'].T
  )
  with pytest.raises(convert.ConversionError, match='known for heads/other'):
    convert_umt.sources(('heads/other',), student)


def test_a_bias_of_a_student_is_never_dropped(student):
  bare = STUDENT.clone(qkv_bias='none')
  with pytest.raises(convert.ConversionError, match=r'unused: .*attn\.q_bias'):
    convert_umt.from_umt(student, {'encoder': shapes(bare, 4)}, encoder=bare)


def test_position_tables_are_compared(student):
  encoder = {'encoder': shapes(STUDENT, 4)}
  table = positions.fixed_table('flat_sinusoid', 48, (4, 4, 4))
  wide = positions.interpolate(jnp.asarray(table), (4, 4, 4), (8, 2, 2))
  for good in (table, wide):
    state = {**student, 'encoder.pos_embed': np.asarray(good)[None]}
    convert_umt.from_umt(state, encoder, encoder=STUDENT)
  state = {**student, 'encoder.pos_embed': table[None] + 0.01}
  with pytest.raises(convert.ConversionError, match='none of the tables'):
    convert_umt.from_umt(state, encoder, encoder=STUDENT)
  learned = STUDENT.clone(positions='learned')
  template = {'encoder': shapes(learned, 4)}
  got = convert_umt.from_umt(state, template, encoder=learned)
  np.testing.assert_array_equal(
    got['encoder']['pos_embed'], state['encoder.pos_embed'][0]
  )
