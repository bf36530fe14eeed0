"""Run the recorded cases of VideoPrism: encoder, classifier, video and text."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from vfm_jax import convert_videoprism
from vfm_jax.models import videoprism_clip
from vfm_jax.models.videoprism import VideoPrism, VideoPrismClassifier
from vfm_jax.models.videoprism_clip import TextTower, VideoPrismClip
from vfm_jax.nn import layers, prism
from vfm_jax.ops import positions, tokens
from vfm_jax.trees import path_leaves


def run_h_videoprism_encoder(meta: dict, arrays: dict) -> dict:
  model = _encoder(meta['config'])
  video = arrays['in/video']
  params, official = _params(model, arrays, video)

  @jax.jit
  def compute(params):
    def loss(params):
      spatial, final = stages(params, None)
      return jnp.square(final).mean(), (spatial, final)

    def stages(params, valid):
      return model.apply({'params': params}, video, valid, method='stages')

    out = {}
    if 'in/video_other_size' in arrays:
      other = model.apply({'params': params}, arrays['in/video_other_size'])
      out['out/embeddings_interpolated_pos'] = other
    if 'in/frame_paddings' in arrays:
      spatial, final = stages(params, arrays['in/frame_paddings'] == 0)
      out['out/spatial_features_frame_paddings'] = spatial
      out['out/embeddings_frame_paddings'] = final
    (value, (spatial, final)), grads = jax.value_and_grad(loss, has_aux=True)(
      params
    )
    out |= {'out/embeddings': final, 'out/spatial_features': spatial}
    return out | {'out/loss_mean_square': value}, grads

  out, grads = compute(params)
  return out | _grads(arrays, official, grads)


def run_h_videoprism_classifier(meta: dict, arrays: dict) -> dict:
  cfg = meta['config']
  model = VideoPrismClassifier(
    _encoder(cfg['encoder_params']), num_classes=cfg['num_classes']
  )
  video = arrays['in/video']
  params, _ = _params(model, arrays, video)

  def run(model):
    pooled = model.embed(video)
    return model.encoder(video), pooled, model(video)

  outs = jax.jit(lambda p: model.apply({'params': p}, method=run))(params)
  names = 'spatiotemporal_features', 'global_embeddings', 'logits'
  return dict(zip((f'out/{n}' for n in names), outs, strict=True))


def run_h_videoprism_clip(meta: dict, arrays: dict) -> dict:
  cfg = meta['config']
  model = VideoPrismClip(
    # The policy of norms is one of the text tower.
    _encoder({**cfg, 'norm_policy': 'pre'}),
    TextTower(
      vocabulary=cfg['vocabulary_size'],
      width=cfg['model_dim'],
      heads=cfg['num_heads'],
      depth=cfg['num_unimodal_layers'],
      causal=cfg['enable_causal_atten'],
      cap=cfg['atten_logit_cap'],
      norm_policy=cfg['norm_policy'],
    ),
    auxiliary_depth=cfg['num_auxiliary_layers'],
  )
  video = arrays['in/video']
  text = arrays['in/text_ids'], arrays['in/text_paddings'] == 0
  params, _ = _params(model, arrays, video)

  def run(model):
    frames = model.embed_frames(video)
    return model(video), model.embed(video), model.embed_text(*text), frames

  outs = jax.jit(lambda p: model.apply({'params': p}, method=run))(params)
  units, videos, texts, frames = outs
  return {
    'out/video_embeddings': units,
    'out/text_embeddings': layers.unit(texts),
    'out/video_embeddings_unnormalised': videos,
    'out/text_embeddings_unnormalised': texts,
    'out/frame_embeddings': layers.unit(frames),
  }


def run_h_videoprism_primitives(meta: dict, arrays: dict) -> dict:
  for text, want in meta['config']['canonicalize_text'].items():
    assert videoprism_clip.canonical(text) == want
  # Compiled at once.
  return jax.jit(lambda: _primitives(arrays))()


def _primitives(arrays):
  out = {}
  for name, value in arrays.items():
    if m := re.fullmatch(r'out/interp2d_(\d+)x(\d+)', name):
      (source,) = (k for k in arrays if k.startswith('in/emb2d_'))
      old, new = re.findall(r'(\d+)x(\d+)', source)[0], m.groups()
      out[name] = _resized(arrays[source], old, new)
    elif m := re.fullmatch(r'out/interp1d_(\d+)', name):
      (source,) = (k for k in arrays if k.startswith('in/emb1d_'))
      out[name] = _resized(
        arrays[source], (source.split('_')[-1], 1), (m[1], 1)
      )
    elif m := re.fullmatch(r'out/patches_p(\d+)', name):
      patch = (1, int(m[1]), int(m[1]))
      out[name] = tokens.patchify(arrays['in/image'][:, None], patch)
    elif m := re.fullmatch(r'out/sinusoid_len(\d+)_dim(\d+)', name):
      out[name] = videoprism_clip.text_positions(int(m[1]), int(m[2]))[None]
    elif name == 'out/ln':
      params = {'scale': 1 + arrays['w/ln/scale'], 'bias': arrays['w/ln/bias']}
      x = arrays['in/ln_x']
      out[name] = layers.LayerNorm().apply({'params': params}, x)
    elif name == 'out/per_dim_scale':
      scale = prism.per_dim_scale(jnp.asarray(arrays['w/per_dim_scale']))
      out[name] = arrays['in/ln_x'] * scale
    else:
      assert not name.startswith('out/'), value.shape
  return out


def _resized(table, old, new):
  old, new = ((1, int(h), int(w)) for h, w in (old, new))
  return positions.interpolate(table[0], old, new, 'antialiased')[None]


def _encoder(cfg):
  frames, *grid = cfg['pos_emb_shape']
  return VideoPrism(
    width=cfg['model_dim'],
    spatial_depth=cfg['num_spatial_layers'],
    temporal_depth=cfg['num_temporal_layers'],
    heads=cfg['num_heads'],
    mlp_width=cfg['mlp_dim'],
    frames=frames,
    patch=cfg['patch_size'],
    image_size=tuple(cfg['patch_size'] * n for n in grid),
    cap=cfg['atten_logit_cap'],
    norm_policy=cfg.get('norm_policy', 'pre'),
  )


def _params(model, arrays, video):
  """Return our parameters, and the official ones, by name."""
  official = {k[2:]: v for k, v in arrays.items() if k.startswith('w/')}
  shapes = jax.eval_shape(model.init, jax.random.key(0), video)['params']
  return convert_videoprism.from_videoprism(official, shapes), official


def _grads(arrays, official, grads):
  """Return our gradients in the official layout, by official name.

  Parameters are official ones in another order, some plus one: converting
  their numbers, less what zeros become, tells where each one went.
  """
  state = convert_videoprism.unstacked(official)
  flat = dict(path_leaves(grads))
  found = {}
  for path, source in convert_videoprism.sources(tuple(flat), state).items():
    grad = np.asarray(flat[path], np.float64)
    sizes = [state[n].size for n in source.names]
    shape = (-1, *state[source.names[0]].shape[1:])
    numbers = np.arange(sum(sizes), dtype=float).reshape(shape)
    at = source.convert(numbers, grad.shape)
    at = at - source.convert(np.zeros_like(numbers), grad.shape)
    by_place = np.empty(grad.size)
    by_place[at.ravel().astype(int)] = grad.ravel()
    parts = np.split(by_place, np.cumsum(sizes)[:-1])
    for name, part in zip(source.names, parts, strict=True):
      found[name] = part.reshape(state[name].shape)
  out = {}
  for name in arrays:
    kind, _, key = name.partition('/')
    if kind not in ('grad', 'gradnorm'):
      continue
    grad = found.get(key)
    if grad is None:
      depth = len(official[key])
      grad = np.stack([found[f'{key}[{i}]'] for i in range(depth)])
    out[name] = np.sqrt(np.square(grad).sum()) if kind == 'gradnorm' else grad
  return out
