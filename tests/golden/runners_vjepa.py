"""Run the recorded cases of V-JEPA and V-JEPA 2.

Each runner takes the sidecar and the arrays of a case and returns what this
library computes for every array to check, driven by the sidecar.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np

from vfm_jax import convert_vjepa, trees
from vfm_jax.models.attentive import AttentiveClassifier, AttentivePooler
from vfm_jax.models.encoders import VideoViT
from vfm_jax.models.vjepa import (
  ActionPredictor,
  LatentPredictor,
  frame_causal,
)
from vfm_jax.nn.transformer import Attention, Placement
from vfm_jax.objectives.latent import LatentPrediction
from vfm_jax.ops import rope
from vfm_jax.ops.blocks import Split


def run_c_vjepa_step(meta: dict, arrays: dict) -> dict:
  cfg = meta['config']
  positions = 'sincos_3d' if cfg['uniform_power'] else 'sincos_3d_split'
  objective = _objective(
    cfg,
    arrays,
    encoder=dict(positions=positions),
    predictor=dict(
      positions=positions,
      heads=cfg['num_heads'],
      mlp_ratio=cfg['pred_mlp_ratio'],
    ),
  )
  out, made, metrics, params, extra = _step(objective, arrays)
  encode = jax.jit(objective.encode)
  video = _last(arrays['in/video'])
  other = _last(arrays['in/video_other_resolution'])
  out |= {
    'out/encoder_full': encode(params, video),
    'out/target_encoder_full': encode({'encoder': extra['target']}, video),
    'out/encoder_interp_pos': encode(params, other),
    'out/loss_jepa': metrics['latent_error'],
    'out/loss_reg': metrics['latent_hinge'],
  }
  for i, split in enumerate(made.splits):
    rows = np.arange(len(video))[:, None]
    targets = np.asarray(made.targets)
    out[f'out/target_{i}'] = targets[rows, np.asarray(split.target_idx)]
  return out


def run_d_vjepa2_step(meta: dict, arrays: dict) -> dict:
  cfg = meta['config']
  assert cfg['use_rope']
  objective = _objective(
    cfg,
    arrays,
    encoder=dict(positions='rope_3d_tiled', gate=_gate(cfg, cfg['use_silu'])),
    predictor=dict(
      positions='rope_3d_tiled',
      heads=cfg['pred_heads'],
      gate=_gate(cfg, cfg['pred_use_silu']),
    ),
    mask_token='shared',
  )
  out, made, _, params, _ = _step(objective, arrays)
  video = _last(arrays['in/video'])
  short = _last(arrays['in/video_nonsquare'])
  owned = dataclasses.replace(objective, mask_token='own')

  @jax.jit
  def more(params):
    full, taps = objective.encoder.apply(
      {'params': params['encoder']},
      video,
      tuple(range(cfg['depth'])),
      method='tapped',
    )
    given = video, made.encoded[0], made.splits[0]
    whole = owned.predict(params, *given, whole=True)
    order = jnp.argsort(jnp.concatenate(made.splits[0], axis=1), axis=1)
    return {
      'out/pred_0_mask_index1': owned.predict(params, *given, 1),
      'out/pred_0_all_tokens_sorted': jnp.take_along_axis(
        whole, order[..., None], axis=1
      ),
      'out/encoder_full': full,
      'out/encoder_full_handle_nonsquare_false': full[:1],
      'out/encoder_nonsquare_short': objective.encode(params, short),
      'out/encoder_out_layers': jnp.stack(taps)[:, :1],
    }

  return {**out, **more(params), 'out/target_full_normed': made.targets}


def run_d_vjepa2_ac_predictor(meta: dict, arrays: dict) -> dict:
  cfg = meta['config']
  model = ActionPredictor(
    width=cfg['predictor_embed_dim'],
    depth=cfg['depth'],
    heads=cfg['num_heads'],
    mlp_ratio=cfg['mlp_ratio'],
    extrinsics=cfg['use_extrinsics'],
    layout='tiled',
    gate=_gate(cfg, cfg.get('use_silu', False)),
    norm_eps=cfg['layernorm_eps'],
  )
  t, h, w = cfg['grid']
  names = ['tokens', 'actions', 'states']
  names += ['extrinsics'] if cfg['use_extrinsics'] else []
  given = [arrays[f'in/{name}'] for name in names]
  template = jax.eval_shape(
    lambda *x: model.init(jax.random.key(0), *x, grid=(t, h, w)), *given
  )
  params = convert_vjepa.from_vjepa(
    _weights(arrays), {'predictor': template['params']}
  )['predictor']

  @jax.jit
  def predict(params):
    start = [given[0][:, : 2 * h * w], *(x[:, :2] for x in given[1:])]
    return (
      model.apply({'params': params}, *given, grid=(t, h, w)),
      model.apply({'params': params}, *start, grid=(2, h, w)),
    )

  whole, prefix = predict(params)
  return {
    'out/pred': whole,
    'out/pred_first_2_frames': prefix,
    'out/attn_mask': frame_causal(t, h * w + len(names) - 1).astype(np.uint8),
  }


def run_c_vjepa_attentive(meta: dict, arrays: dict) -> dict:
  return _attentive(meta['config'], arrays, 'queries')


def run_d_vjepa2_attentive(meta: dict, arrays: dict) -> dict:
  return _attentive(meta['config'], arrays, 'tokens')


def run_d_vjepa2_rope(meta: dict, arrays: dict) -> dict:
  cfg, out = meta['config'], {}
  idx, side = arrays['in/attn_mask_ids'], cfg['grid_size']
  grid = (int(idx.max()) // side**2 + 1, side, side)
  attended = {'out/attn_masked': (arrays['in/attn_x'], grid, idx)}
  for name, expected in arrays.items():
    if found := re.fullmatch(r'out/sep_pos_T(\d+)H(\d+)W(\d+)', name):
      out[name] = _coordinates(tuple(map(int, found.groups())))
    elif found := re.fullmatch(r'out/sep_pos_grid(\d+)', name):
      side = int(found[1])
      frames = expected.shape[1] // side**2
      out[name] = _coordinates((frames, side, side))
    elif found := re.fullmatch(r'out/attn_full_T(\d+)H(\d+)W(\d+)', name):
      grid = tuple(map(int, found.groups()))
      attended[name] = (arrays['in/attn_x_full'], grid, None)
  attend = _attention(cfg, arrays)

  @jax.jit
  def compute():
    return {
      **_rotated(arrays),
      **{name: attend(*given) for name, given in attended.items()},
    }

  return {**out, **compute()}


def _rotated(arrays):
  out = {}
  for name, x in arrays.items():
    if not (found := re.fullmatch(r'in/x_(\d+)', name)):
      continue
    # [B, H, N, D], with heads as examples, for each has its own positions.
    flat = jnp.asarray(x).reshape(-1, *x.shape[2:])[:, :, None]
    for kind, key in (('1d', 'pos1d'), ('bhn', 'pos_bhn')):
      at = arrays[f'in/{key}_{found[1]}'].reshape(-1, x.shape[2])
      angle = rope.axis_angles(jnp.asarray(at), x.shape[-1], 'tiled')
      by = rope.Rotation(jnp.cos(angle), jnp.sin(angle))
      out[f'out/rot_{kind}_{found[1]}'] = rope.rotate(flat, by)
  return out


def _coordinates(grid):
  return rope.coordinates(grid).T.astype(np.int32)


def _attention(cfg, arrays):
  """Return a function of tokens, grid and indices: the recorded layer."""
  dim, heads = cfg['attn_dim'], cfg['num_heads']
  model = Attention(heads, 'full')
  state = {
    k.replace('w/attn.', 'blocks.0.attn.'): v
    for k, v in arrays.items()
    if k.startswith('w/')
  }
  x = arrays['in/attn_x']
  template = jax.eval_shape(model.init, jax.random.key(0), x)['params']
  params = convert_vjepa.from_vjepa(
    state, {'encoder': {'blocks_0': {'attn': template}}}
  )['encoder']['blocks_0']['attn']

  def attend(x, grid, idx):
    idx = None if idx is None else jnp.asarray(idx)
    by = rope.of_tokens(grid, idx, dim // heads, 'tiled')
    return model.apply({'params': params}, jnp.asarray(x), Placement(by))

  return attend


def _attentive(cfg, arrays, side):
  calls = {}
  for name, tokens in arrays.items():
    if not (found := re.fullmatch(r'in/(\w+)_tokens', name)):
      continue
    tag, heads = found[1], cfg['num_heads']
    state = _weights(arrays, f'w/{tag}.')
    whole = 'linear.weight' in state
    start = 'pooler.' if whole else ''
    blocks = {
      k.removeprefix(start).split('.')[1]
      for k in state
      if k.startswith(f'{start}blocks.')
    }
    pooler = AttentivePooler(
      heads=heads[tag] if isinstance(heads, dict) else heads,
      queries=state[f'{start}query_tokens'].shape[1],
      depth=1 + len(blocks),
      side=side,
      complete=any('xattn.' in k for k in state),
      mlp_ratio=cfg.get('mlp_ratio', 4),
      norm_eps=cfg['layernorm_eps'],
    )
    classes = len(state['linear.bias']) if whole else 1
    model = AttentiveClassifier(classes, pooler) if whole else pooler
    template = jax.eval_shape(model.init, jax.random.key(0), tokens)['params']
    if whole:
      params = convert_vjepa.from_probe(state, template)
      calls[f'out/{tag}_logits'] = model, params, tokens
    else:
      params = convert_vjepa.from_probe(state, {'pooler': template})
    calls[f'out/{tag}_pooled'] = pooler, params['pooler'], tokens
  given = {name: call[1:] for name, call in calls.items()}

  @jax.jit
  def compute(given):
    return {
      name: calls[name][0].apply({'params': params}, tokens)
      for name, (params, tokens) in given.items()
    }

  return compute(given)


def _objective(cfg, arrays, encoder, predictor, **kwargs):
  """Return the objective of a case, whose masks are those recorded."""
  pairs = sorted(
    int(name.rsplit('_', 1)[1])
    for name in arrays
    if name.startswith('in/masks_enc_')
  )
  splits = [
    Split(*(jnp.asarray(arrays[f'in/masks_{x}_{i}']) for x in ('enc', 'pred')))
    for i in pairs
  ]
  size, eps = cfg['img_size'], cfg['layernorm_eps']
  return LatentPrediction(
    encoder=VideoViT(
      width=cfg['embed_dim'],
      depth=cfg['depth'],
      heads=cfg['num_heads'],
      mlp_ratio=cfg['mlp_ratio'],
      patch=cfg['patch_size'],
      tubelet=cfg['tubelet_size'],
      frames=cfg['num_frames'],
      image_size=size if isinstance(size, int) else tuple(size),
      qkv_bias='full',
      norm_eps=eps,
      **encoder,
    ),
    predictor=LatentPredictor(
      width=cfg['pred_dim'],
      depth=cfg['pred_depth'],
      mask_tokens=sum('mask_tokens.' in n for n in arrays if n[:2] == 'w/'),
      norm_eps=eps,
      **predictor,
    ),
    masks=tuple((lambda keys, grid, s=s: s) for s in splits),
    exponent=cfg['loss_exp'],
    hinge=cfg.get('reg_coeff', 0.0),
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    **kwargs,
  )


def _step(objective, arrays):
  """Return what both systems have in common, and the parameters."""
  video = _last(arrays['in/video'])
  batch = {'video': video, 'row': jnp.arange(len(video))}
  template, extra = jax.eval_shape(objective.init, jax.random.key(0), batch)
  state = _weights(arrays)
  loaded = convert_vjepa.from_vjepa(
    state,
    {**template, **extra},
    encoder=objective.encoder,
    predictor=objective.predictor,
  )
  params = {k: loaded[k] for k in template}
  extra = {k: loaded[k] for k in extra}

  keys = jax.random.split(jax.random.key(0), len(video))

  def loss(params, extra):
    made = objective.forward(params, extra, video, keys)
    out = objective.score(made, extra)
    return (out.sums / out.counts).sum(), (made, out.metrics)

  compute = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (value, (made, metrics)), grads = compute(params, extra)
  out = {'out/loss': value, **_grads(arrays, state, grads)}
  for i, (encoded, pred) in enumerate(
    zip(made.encoded, made.preds, strict=True)
  ):
    out |= {f'out/encoder_masked_{i}': encoded, f'out/pred_{i}': pred}
  return out, made, metrics, params, extra


def _grads(arrays, state, grads):
  """Return our gradients for the recorded ones, by official name.

  A gradient is given in the official layout by inverting the conversion on the
  positions of the entries.
  """
  flat, official = dict(trees.path_leaves(grads)), {}
  for path, source in convert_vjepa.sources(tuple(flat), state).items():
    shapes = [state[name].shape for name in source.names]
    sizes = [int(np.prod(s)) for s in shapes]
    numbers = np.arange(sum(sizes)).reshape(-1, *shapes[0][1:])
    places = source.convert(numbers, flat[path].shape)
    values = np.empty(sum(sizes))
    values[places.ravel()] = np.asarray(flat[path], np.float64).ravel()
    parts = np.split(values, np.cumsum(sizes)[:-1])
    for name, part, shape in zip(source.names, parts, shapes, strict=True):
      official[name] = part.reshape(shape)
  out = {}
  for name in arrays:
    kind, _, key = name.partition('/')
    if kind == 'grad':
      out[name] = official[key]
    elif kind == 'gradnorm':
      out[name] = np.sqrt(np.square(official[key]).sum())
  return out


def _gate(cfg, on):
  if not on:
    return 'none'
  return 'two_thirds' if cfg.get('wide_silu', True) else 'full'


def _weights(arrays, prefix='w/'):
  return {
    k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)
  }


def _last(video):
  """Return [B, T, H, W, 3] of a video [B, 3, T, H, W]."""
  return jnp.asarray(video.transpose(0, 2, 3, 4, 1))
