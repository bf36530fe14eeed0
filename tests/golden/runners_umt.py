"""Run the recorded cases of UMT."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import released

from vfm_jax import convert_umt
from vfm_jax.models.aligned import AlignedHeads
from vfm_jax.models.clip import ClipViT
from vfm_jax.models.encoders import VideoViT
from vfm_jax.objectives.distill import Distill, distance
from vfm_jax.objectives.pixels import IMAGENET_MEAN, IMAGENET_STD
from vfm_jax.objectives.teachers import ClipTeacher
from vfm_jax.ops import guided
from vfm_jax.ops import positions as pos
from vfm_jax.ops import tokens as tok

# The released fine-tuning code interpolates the table of so many tokens.
PRETRAINED = (8, 14, 14)


@dataclasses.dataclass(frozen=True)
class Recorded(guided.AttentionGuided):
  """Take the recorded order of the cells in place of a draw."""

  order: tuple = ()

  def __call__(self, keys, grid):
    order = np.tile(self.order[: grid[0]], (len(keys), 1))
    return guided.from_order(order, grid, ratio=self.ratio)

  def guided(self, keys, grid, attention):
    return guided.from_order(np.array(self.order), grid, ratio=self.ratio)


def run_e_umt_step(meta: dict, arrays: dict) -> dict:
  cfg = meta['config']
  assert not cfg['learn_pos']
  assert cfg['kernel'] == 1
  objective = _objective(cfg, arrays)
  video = arrays['in/video'].transpose(0, 2, 3, 4, 1)
  # The teacher of the released code takes the student's input as it is.
  video = video * np.float32(IMAGENET_STD) + np.float32(IMAGENET_MEAN)
  batch = {'video': jnp.asarray(video), 'row': jnp.arange(len(video))}
  template, _ = jax.eval_shape(objective.init, jax.random.key(0), batch)
  state = _part(arrays, 'w/student.')
  params = convert_umt.from_umt(state, template, encoder=objective.encoder)
  teacher = convert_umt.from_clip(
    _part(arrays, 'w/teacher.'), objective.teacher.spec()
  )

  ratio = cfg['loss_ratio']

  def loss(params):
    out = objective.loss(
      {**params, 'teacher': teacher}, {}, batch, jax.random.key(0), train=True
    )
    return ratio * (out.sums / out.counts).sum()

  @jax.jit
  def compute(params):
    video = objective.pixels_of(batch)
    keys = jax.random.split(jax.random.key(0), len(video))
    seen = objective.targets({'teacher': teacher}, video)
    idx, hidden = guided.split(
      objective.mask, keys, objective.grid(video), seen.attention
    )
    _, tapped = objective.encode(params, video, idx)
    pred = objective.predict(params, video, tapped, idx)
    targets = jnp.stack([tok.take(t, idx) for t in seen.features])
    out = {
      'hidden': hidden,
      'out/teacher_attn': seen.attention,
      'out/teacher_features': seen.features,
      'out/targets': targets,
      'out/student_out': pred,
      'out/encoder_out': jnp.stack(tapped),
    }
    for kind in ('l2', 'mse', 'smooth_l1'):
      out[f'out/loss_{kind}'] = ratio * distance(pred, targets, kind).mean()
    return out, jax.value_and_grad(loss)(params)

  out, (value, grads) = compute(params)
  out['out/loss'] = value
  mask = np.zeros(arrays['out/mask'].shape, np.uint8)
  np.put_along_axis(mask, np.asarray(out.pop('hidden')), 1, axis=1)
  out['out/mask'] = mask
  return out | released.gradients(arrays, grads, convert_umt.sources, state)


def run_e_umt_mask_stats(meta: dict, arrays: dict) -> dict:
  cfg = meta['config']
  n, draws = cfg['N'], cfg['draws']
  attention = np.tile(arrays['in/attn'], (draws, 1))
  keys = jax.random.split(jax.random.key(0), draws)

  @functools.partial(jax.jit, static_argnums=0)
  def frequency(visible):
    mask = guided.AttentionGuided(ratio=(n - visible) / n)
    return 1 - mask.guided(keys, (1, n, 1), attention).mean(0)

  return {
    'out/visible_frequency': frequency(cfg['N_vis']),
    'out/first_pick_frequency': frequency(1),
  }


def run_e_umt_pos_tables(meta: dict, arrays: dict) -> dict:
  out = {}
  for cfg in meta['config']:
    table = pos.fixed_table('flat_sinusoid', cfg['d_hid'], PRETRAINED)
    assert len(table) == cfg['pre_n_position']
    side = round((cfg['n_position'] / cfg['cur_frame']) ** 0.5)
    grid = (cfg['cur_frame'], side, side)
    table = pos.interpolate(jnp.asarray(table), PRETRAINED, grid, 'bicubic')
    assert [1, *table.shape] == cfg['full_shape']
    out[f'out/table_{cfg["index"]}'] = table[None, :: cfg['stored_stride']]
  return out


def run_e_umt_finetune(meta: dict, arrays: dict) -> dict:
  cfg = meta['config']
  side = cfg['img_size'] // cfg['patch_size']
  grid = (cfg['all_frames'] // cfg['tubelet_size'], side, side)
  model = VideoViT(
    width=cfg['embed_dim'],
    depth=cfg['depth'],
    heads=cfg['num_heads'],
    mlp_ratio=cfg['mlp_ratio'],
    patch=cfg['patch_size'],
    tubelet=cfg['tubelet_size'],
    frames=PRETRAINED[0] * cfg['tubelet_size'],
    image_size=PRETRAINED[1] * cfg['patch_size'],
    resample='bicubic',
    qkv_bias='qv' if cfg['qkv_bias'] else 'none',
    layer_scale=cfg['init_values'] or 0.0,
    norm_eps=cfg['layernorm_eps'],
    pooling='mean',
    norm='pooled',
    num_classes=cfg['num_classes'],
    init_scheme='finetune',
  )
  video = arrays['in/video'].transpose(0, 2, 3, 4, 1)
  template = jax.eval_shape(model.init, jax.random.key(0), video)['params']
  params = convert_umt.from_umt(
    _part(arrays, 'w/'), {'encoder': template}, encoder=model
  )
  table = pos.fixed_table('flat_sinusoid', cfg['embed_dim'], PRETRAINED)
  table = pos.interpolate(jnp.asarray(table), PRETRAINED, grid, 'bicubic')
  np.testing.assert_allclose(table, arrays['const/pos_embed'][0], atol=2e-5)

  @functools.partial(jax.jit, static_argnums=0)
  def forward(model):
    return model.apply({'params': params['encoder']}, video)

  return {
    'out/features': forward(model.clone(num_classes=0)),
    'out/logits': forward(model),
  }


def _objective(cfg, arrays):
  depth, layers = cfg['depth'], cfg['clip_layers']
  # Whatever the interval, layers are returned in ascending order.
  taps, theirs = (
    tuple(sorted(n - 1 - int(i * step) for i in range(cfg['return_layer'])))
    for n, step in (
      (depth, cfg['student_interval']),
      (layers, cfg['clip_interval']),
    )
  )
  return Distill(
    encoder=VideoViT(
      width=cfg['embed_dim'],
      depth=depth,
      heads=cfg['num_heads'],
      mlp_ratio=cfg['mlp_ratio'],
      patch=cfg['patch_size'],
      tubelet=cfg['tubelet_size'],
      frames=cfg['num_frames'],
      image_size=cfg['img_size'],
      norm_eps=cfg['layernorm_eps_student'],
    ),
    teacher=ClipTeacher(
      ClipViT(
        width=cfg['clip_dim'],
        depth=layers,
        heads=cfg['clip_heads'],
        patch=cfg['teacher_patch_size'],
        features=cfg['clip_out'],
        image_size=cfg['input_res'],
        norm_eps=cfg['layernorm_eps_teacher'],
      ),
      taps=theirs,
      normalise=cfg['norm_type'],
      mean=IMAGENET_MEAN,
      std=IMAGENET_STD,
    ),
    heads=AlignedHeads(
      normalise=cfg['norm_type'], norm_eps=cfg['layernorm_eps_student']
    ),
    mask=Recorded(
      cfg['mask_ratio'], tuple(map(tuple, arrays['in/importance'].tolist()))
    ),
    taps=taps,
    distance=cfg['loss_type'],
  )


def _part(arrays, prefix):
  return {
    k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)
  }
