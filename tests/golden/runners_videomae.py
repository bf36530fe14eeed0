"""Run the recorded cases of VideoMAE and VideoMAE V2.

Each runner takes the sidecar and the arrays of a case and returns what this
library computes for every array to check, driven by the sidecar.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import released

from vfm_jax import convert
from vfm_jax.models.encoders import VideoViT
from vfm_jax.models.predictors import PixelDecoder
from vfm_jax.objectives.masked import IMAGENET_MEAN, IMAGENET_STD, Masked
from vfm_jax.ops import masking


def run_a_videomae_pretrain(meta: dict, arrays: dict) -> dict:
  return _pretrain(meta, arrays)


def run_b_videomaev2_dual_mask(meta: dict, arrays: dict) -> dict:
  return _pretrain(meta, arrays)


def run_a_videomae_finetune(meta: dict, arrays: dict) -> dict:
  return _finetune(meta, arrays)


def run_b_videomaev2_finetune(meta: dict, arrays: dict) -> dict:
  return _finetune(meta, arrays)


def run_a_videomae_tubemask(meta: dict, arrays: dict) -> dict:
  out = {}
  for cfg in meta['config']:
    name = f'out/mask_{cfg["index"]}'
    grid, ratio = tuple(cfg['input_size']), cfg['mask_ratio']
    rng = np.random.RandomState(cfg['np_random_seed'])
    order = _orders(rng, grid[1] * grid[2], len(arrays[name]))
    mask = np.asarray(masking.tube_from_order(order, grid, ratio=ratio))
    per_slice = mask.reshape(len(order), grid[0], -1).sum(-1)
    assert (per_slice == cfg['num_masks_per_frame']).all()
    out[name] = mask.astype(np.uint8)
  return out


def run_b_videomaev2_running_cell(meta: dict, arrays: dict) -> dict:
  out = {}
  for cfg in meta['config']:
    i, grid, ratio = cfg['index'], tuple(cfg['size']), cfg['ratio']
    patterns = masking.running_cell_patterns(grid, ratio=ratio)
    maps = patterns.reshape(cfg['shape'])
    np.testing.assert_allclose(maps[0].mean(-1), cfg['ratio_per_frame'])
    out[f'out/all_mask_maps_{i}'] = maps.astype(np.uint8)
    rng = np.random.RandomState(cfg['np_random_seed'])
    picks = [rng.randint(4) for _ in cfg['picked_map_index']]
    assert picks == cfg['picked_map_index']
    cells = grid[1] * grid[2]
    rng = np.random.RandomState(meta['base_seed'] + 60 + i)
    name = f'out/random_mask_{i}'
    # The ratio of these two is not in the sidecar: it is what they hide.
    ratio = arrays[name].mean()
    order = _orders(rng, cells * grid[0], 1)
    mask = masking.random_from_order(order, grid, ratio=ratio)
    out[name] = np.asarray(mask[0], np.uint8)
    name = f'out/tube_mask_{i}'
    order = _orders(rng, cells, 1)
    mask = masking.tube_from_order(order, grid, ratio=arrays[name].mean())
    out[name] = np.asarray(mask[0], np.uint8).reshape(grid[0], cells)
  return out


def _orders(rng, n, count):
  """Shuffle 0..n-1 as the official code shuffles its flags."""
  orders = np.tile(np.arange(n), (count, 1))
  for row in orders:
    rng.shuffle(row)
  return orders


@dataclasses.dataclass(frozen=True)
class Kept(Masked):
  """Keep what the loss reconstructs."""

  made: list = dataclasses.field(default_factory=list)

  def reconstruct(self, *args, **kwargs):
    self.made.append(super().reconstruct(*args, **kwargs))
    return self.made[-1]


def _pretrain(meta, arrays):
  cfg = meta['config']
  mask = _flat_mask(arrays['in/mask'])
  skipped = None
  if 'in/decode_mask' in arrays:
    skipped = _flat_mask(arrays['in/decode_mask'])
  shared = _shared(cfg)
  objective = Kept(
    encoder=VideoViT(
      width=cfg['encoder_embed_dim'],
      depth=cfg['encoder_depth'],
      heads=cfg['encoder_num_heads'],
      **_geometry(cfg, arrays),
      **shared,
    ),
    decoder=PixelDecoder(
      width=cfg['decoder_embed_dim'],
      depth=cfg['decoder_depth'],
      heads=cfg['decoder_num_heads'],
      **shared,
    ),
    mask=lambda keys, grid: mask,
    decoder_mask=None if skipped is None else lambda keys, grid: skipped,
  )
  video = _pixels(arrays)
  batch = {'video': video, 'row': jnp.arange(len(video))}
  template, _ = jax.eval_shape(objective.init, jax.random.key(0), batch)
  state = _weights(arrays)
  params = convert.from_videomae(state, template)

  def loss(params, objective=objective):
    out = objective.loss(params, {}, batch, jax.random.key(0), train=True)
    return (out.sums / out.counts).sum(), objective.made.pop()

  @jax.jit
  def compute(params):
    (value, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
    found = {
      'out/encoder_out': out.encoded,
      'out/pred': out.pred,
      'out/labels': out.target,
      'out/cal_loss_mask': out.weight.astype(jnp.uint8),
      'out/loss': value,
      **_intermediates(objective, params, video, mask, out),
    }
    if 'out/loss_raw_pixels' in arrays:
      raw = dataclasses.replace(objective, normalise_target=False)
      found['out/loss_raw_pixels'], raw_out = loss(params, raw)
      target = raw_out.target
      found |= _heads_of(arrays, 'out/labels_raw_first_token', target)
    if 'out/loss_no_decoder_mask' in arrays:
      plain = dataclasses.replace(objective, decoder_mask=None)
      found['out/loss_no_decoder_mask'], plain_out = loss(params, plain)
      pred = plain_out.pred
      found |= _heads_of(arrays, 'out/pred_no_decoder_mask_first', pred)
    return found, grads

  found, grads = compute(params)
  return found | released.gradients(arrays, grads, convert.sources, state)


def _heads_of(arrays, start, value):
  """Return the first tokens of value, as many as were recorded."""
  names = [n for n in arrays if n.startswith(start)]
  return {n: value[:, : arrays[n].shape[1]] for n in names}


def _intermediates(objective, params, video, mask, out):
  normalised = (video - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
  # What comes before the first block needs none.
  encoder, decoder = (
    m.clone(depth=0) for m in (objective.encoder, objective.decoder)
  )
  _, state = encoder.apply(
    {'params': params['encoder']}, normalised, capture_intermediates=True
  )
  patches = state['intermediates']['patch_embed']['__call__'][0]
  visible = np.nonzero(~mask)[1].reshape(len(mask), -1)
  _, state = decoder.apply(
    {'params': params['decoder']},
    out.encoded,
    visible,
    out.target_idx,
    features=out.pred.shape[-1],
    grid=objective.encoder.built_grid,
    built_grid=objective.encoder.built_grid,
    capture_intermediates=True,
  )
  seen = state['intermediates']
  return {
    'out/patch_embed': patches,
    'out/encoder_to_decoder': seen['embed']['__call__'][0],
    'out/decoder_in': seen['decoder_in'][0],
  }


def _finetune(meta, arrays):
  cfg = meta['config']
  state = _weights(arrays)
  mean_pooling = cfg.get('use_mean_pooling', 'fc_norm.weight' in state)
  learnt = cfg.get('use_learnable_pos_emb', False)
  model = VideoViT(
    width=cfg['embed_dim'],
    depth=cfg['depth'],
    heads=cfg['num_heads'],
    positions='learned' if learnt else 'flat_sinusoid',
    # The official forward pass detaches the table.
    train_positions=False,
    pooling='mean' if mean_pooling else 'first',
    norm='pooled' if mean_pooling else 'tokens',
    num_classes=cfg['num_classes'],
    init_scheme='finetune',
    **_geometry(cfg, arrays),
    **_shared(cfg),
  )
  video = arrays['in/video'].transpose(0, 2, 3, 4, 1)
  template = jax.eval_shape(model.init, jax.random.key(0), video)['params']
  params = convert.from_videomae(state, {'encoder': template})

  @functools.partial(jax.jit, static_argnums=1)
  def forward(params, model=model):
    return model.apply({'params': params['encoder']}, video)

  out = {
    'out/features': forward(params, model.clone(num_classes=0)),
    'out/logits': forward(params),
  }
  if 'out/logits_no_mean_pooling' in arrays:
    first = model.clone(pooling='first', norm='tokens')
    encoder = dict(params['encoder'])
    encoder['norm'] = encoder.get('fc_norm', encoder.get('norm'))
    out['out/logits_no_mean_pooling'] = forward({'encoder': encoder}, first)
  if 'in/label' in arrays:

    def loss(params):
      labels = jnp.asarray(arrays['in/label'])
      return optax.softmax_cross_entropy_with_integer_labels(
        forward(params), labels
      ).mean()

    out['out/loss'], grads = jax.jit(jax.value_and_grad(loss))(params)
    out |= released.gradients(arrays, grads, convert.sources, state)
    if learnt:
      assert not np.any(grads['encoder']['pos_embed'])
  return out


def _geometry(cfg, arrays):
  size = cfg['img_size']
  frames = cfg.get('num_frames', cfg.get('all_frames'))
  if frames is None:
    frames = arrays['in/video'].shape[2]
  return dict(
    patch=cfg['patch_size'],
    tubelet=cfg['tubelet_size'],
    frames=frames,
    image_size=size if isinstance(size, int) else tuple(size),
  )


def _shared(cfg):
  return dict(
    mlp_ratio=cfg['mlp_ratio'],
    qkv_bias='qv' if cfg['qkv_bias'] else 'none',
    layer_scale=cfg.get('init_values') or 0.0,
    cosine=cfg.get('cos_attn', False),
    norm_eps=cfg.get('layernorm_eps', 1e-6),
  )


def _pixels(arrays):
  """Return the video [B, T, H, W, 3] in [0, 1]."""
  video = arrays['in/video'].transpose(0, 2, 3, 4, 1)
  pixels = video * np.float32(IMAGENET_STD) + np.float32(IMAGENET_MEAN)
  return jnp.asarray(pixels)


def _flat_mask(mask):
  return np.asarray(mask, bool).reshape(len(mask), -1)


def _weights(arrays):
  return {k[2:]: v for k, v in arrays.items() if k.startswith('w/')}
