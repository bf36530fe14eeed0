"""Run the recorded cases of the detector of actions in time.

The runners take what those of `runners_tal` take.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np

from vfm_jax import trees
from vfm_jax.evals.tal_data import Grid, Video
from vfm_jax.evals.tal_decode import Decoding, Proposals
from vfm_jax.evals.tal_losses import losses as losses_of
from vfm_jax.evals.tal_losses import targets
from vfm_jax.evals.tal_train import decay_kernels, pad_batch, padded_length
from vfm_jax.models.temporal_localization import TemporalDetector
from vfm_jax.models.temporal_pyramid import Norms, Pyramid, TopDown
from vfm_jax.ops import segments as segments_lib

# Official names of weights, by the path of our parameters.
_NAMES = (
  (r'pyramid/embed_norm_(\d+)/', r'backbone.embd_norm.\1.'),
  (r'pyramid/embed_(\d+)/', r'backbone.embd.\1.conv.'),
  (r'blocks/(\w+)/(\d+)/(ln\d)/', r'backbone.\1.\2.\3.'),
  (r'blocks/(\w+)/(\d+)/fc1/', r'backbone.\1.\2.mlp.0.'),
  (r'blocks/(\w+)/(\d+)/fc2/', r'backbone.\1.\2.mlp.3.'),
  (r'blocks/(\w+)/(\d+)/scale_(\w+)', r'backbone.\1.\2.drop_path_\3.scale'),
  (r'blocks/(\w+)/(\d+)/attn/relative', r'backbone.\1.\2.attn.rel_pe'),
  (r'blocks/(\w+)/(\d+)/attn/(\w+)/', r'backbone.\1.\2.attn.\3.'),
  (r'blocks/(\w+)/(\d+)/(conv\d|downsample)/', r'backbone.\1.\2.\3.conv.'),
  (r'neck/norm_(\d+)/', r'neck.fpn_norms.\1.'),
  (r'neck/lateral_(\d+)/', r'neck.lateral_convs.\1.conv.'),
  (r'neck/smooth_(\d+)/', r'neck.fpn_convs.\1.conv.'),
  (r'classify/conv_(\d+)/', r'cls_head.head.\1.conv.'),
  (r'classify/norm_(\d+)/', r'cls_head.norm.\1.'),
  (r'classify/last/', r'cls_head.cls_head.conv.'),
  (r'measure/conv_(\d+)/', r'reg_head.head.\1.conv.'),
  (r'measure/norm_(\d+)/', r'reg_head.norm.\1.'),
  (r'measure/last/', r'reg_head.offset_head.conv.'),
)

# The same of what is one parameter for queries, keys and values.
_JOINT = {
  'conv_kernel': '_conv.conv.weight',
  'norm_scale': '_norm.weight',
  'norm_bias': '_norm.bias',
  'kernel': '.weight',
  'bias': '.bias',
}


def run_f_tal_thumos(meta: dict, arrays: dict) -> dict:
  cfg = meta['config']
  model = detector(cfg)
  length, meta_of = cfg['max_seq_len'], cfg['video_meta']
  assert model.divisor == cfg['max_div_factor']
  params = weights(model, arrays, cfg['input_dim'])
  out = {}

  videos = [
    Video(
      arrays[f'in/feats_{i}'].T,
      arrays[f'in/segments_{i}'],
      arrays[f'in/labels_{i}'],
    )
    for i in range(len(cfg['lens']))
  ]
  batch = pad_batch(videos, length)
  points = segments_lib.points(length, cfg['regression_range'])
  out['out/points'] = np.stack(points, axis=1)
  train = cfg['train_cfg']
  classes, offsets = targets(
    batch, points, cfg['num_classes'], train['center_sample_radius']
  )
  out['out/cls_targets'], out['out/reg_targets'] = classes, offsets

  def loss_of(params):
    found, state = model.apply(
      {'params': params},
      batch['features'],
      batch['mask'],
      capture_intermediates=lambda m, _: isinstance(m, Pyramid),
    )
    losses = losses_of(
      found,
      classes,
      offsets,
      jnp.float32(train['init_loss_norm']),
      smoothing=train['label_smoothing'],
      weight=train['loss_weight'],
    )
    backbone = state['intermediates']['pyramid']['__call__'][0]
    return losses.total, (losses, found, backbone)

  grads, (losses, found, backbone) = jax.jit(jax.grad(loss_of, has_aux=True))(
    params
  )
  out['out/final_loss'] = losses.total
  out['out/cls_loss'] = losses.classification
  out['out/reg_loss'] = losses.regression
  out['out/loss_normalizer_after'] = losses.normaliser
  for level in range(model.levels):
    out[f'out/train_cls_logits_L{level}'] = found.logits[level]
    out[f'out/train_offsets_L{level}'] = found.offsets[level]
    mask = found.masks[level][:, None]
    out[f'out/train_mask_L{level}'] = mask.astype(np.uint8)
    x = backbone[level][0].transpose(0, 2, 1)
    out[f'out/train_backbone_L{level}'] = x
  for name, grad in official(model, grads).items():
    norm = np.linalg.norm(grad)
    if re.search(r'\.key(_norm)?\.bias$', name):
      # What is added to all keys changes no softmax: 0 but for rounding.
      np.testing.assert_allclose(grad, 0, atol=meta['tolerance']['atol_grad'])
      grad, norm = arrays.get(f'grad/{name}'), arrays[f'gradnorm/{name}']
    out[f'grad/{name}'] = grad
    out[f'gradnorm/{name}'] = norm
  decayed = cfg.get('adamw_groups', {}).get('decay')
  if decayed is not None:
    ours = {
      name
      for path, _ in trees.path_leaves(params)
      if decay_kernels(path, 2)
      for name in official_names(path, model)
    }
    assert ours == set(decayed)

  test = cfg['test_cfg']
  decoding = Decoding(
    per_class=test['multiclass_nms'],
    soft=test['nms_method'] == 'soft',
    sigma=test['nms_sigma'],
    iou_threshold=test['iou_threshold'],
    vote_threshold=test['voting_thresh'],
    max_segments=test['max_seg_num'],
    min_duration=test['duration_thresh'],
    pre_threshold=test['pre_nms_thresh'],
    pre_topk=test['pre_nms_topk'],
    min_score=test['min_score'],
  )
  if 'in/feats_long' in arrays:
    x = arrays['in/feats_long'].T
    padded = padded_length(len(x), length, model.divisor)
    one = pad_batch([unlabelled(x)], padded)
    long = jax.jit(model.apply)(
      {'params': params}, one['features'], one['mask']
    )
    for level, logits in enumerate(long.logits):
      out[f'out/infer_long_cls_logits_L{level}'] = logits
  # A video is padded to the same length in evaluation, where nothing drops.
  found = jax.device_get(found)
  for i, about in enumerate(meta_of):
    name, of_video = f'v{i}', found.video(i)
    for level, logits in enumerate(of_video.logits):
      out[f'out/infer_{name}_cls_logits_L{level}'] = logits
    raw = decoding.read_off(of_video)
    prefix = f'out/infer_{name}_'
    raw = align(
      raw,
      arrays[f'{prefix}pre_nms_scores'],
      arrays[f'{prefix}pre_nms_segments'],
    )
    kept = align(
      decoding.thin_out(raw),
      arrays[f'{prefix}scores'],
      arrays[f'{prefix}nms_segments_grid'],
    )
    fps, stride = about['fps'], about['feat_stride']
    grid = Grid(0.5 * about['feat_num_frames'] / fps, stride / fps)
    out |= {
      f'{prefix}pre_nms_segments': raw.segments,
      f'{prefix}pre_nms_scores': raw.scores,
      f'{prefix}pre_nms_labels': raw.labels,
      f'{prefix}nms_segments_grid': kept.segments,
      f'{prefix}segments_sec': grid.to_seconds(
        kept.segments, about['duration']
      ),
      f'{prefix}scores': kept.scores,
      f'{prefix}labels': kept.labels,
    }
  return out


run_f_tal_anet = run_f_tal_thumos


def run_f_tal_options(meta: dict, arrays: dict) -> dict:
  out = {}
  for tag, cfg in meta['config'].items():
    model = detector(cfg)
    own = {
      k.replace(f'w/{tag}.', 'w/'): v
      for k, v in arrays.items()
      if k.startswith(f'w/{tag}.')
    }
    params = weights(model, own, cfg['input_dim'])
    x = arrays[f'in/{tag}_feats'].T
    padded = padded_length(len(x), cfg['max_seq_len'], model.divisor)
    one = pad_batch([unlabelled(x)], padded)
    found, state = jax.jit(
      lambda x, mask, model=model, params=params: model.apply(
        {'params': params},
        x,
        mask,
        capture_intermediates=lambda m, _: isinstance(m, (Norms, TopDown)),
      )
    )(one['features'], one['mask'])
    neck = state['intermediates']['neck']['__call__'][0]
    for level in range(model.levels):
      out[f'out/{tag}_cls_logits_L{level}'] = found.logits[level]
      out[f'out/{tag}_offsets_L{level}'] = found.offsets[level]
      out[f'out/{tag}_neck_L{level}'] = neck[level][0].transpose(0, 2, 1)
  return out


def unlabelled(features: np.ndarray) -> Video:
  """Return a video without actions."""
  return Video(features, np.zeros((0, 2)), np.zeros(0))


def detector(cfg: dict) -> TemporalDetector:
  """Return the detector of an official configuration."""
  window = cfg['n_mha_win_size']
  levels = cfg['backbone_arch'][2] + 1
  windows = window if isinstance(window, list) else [window] * levels
  assert cfg['scale_factor'] == 2
  assert cfg['embd_kernel_size'] == cfg['head_kernel_size'] == 3
  assert cfg['embd_with_ln']
  assert cfg['fpn_with_ln']
  identity = cfg['fpn_type'] == 'identity'
  return TemporalDetector(
    num_classes=cfg['num_classes'],
    pyramid=Pyramid(
      windows=tuple(windows),
      width=cfg['embd_dim'],
      heads=cfg['n_head'],
      embed=cfg['backbone_arch'][0],
      stem=cfg['backbone_arch'][1],
      block='conv' if cfg['backbone_type'] == 'conv' else 'transformer',
      positions='sinusoid' if cfg['use_abs_pe'] else 'none',
      table=cfg['max_seq_len'],
      relative=cfg['use_rel_pe'],
      drop_path=cfg['train_cfg']['droppath'],
    ),
    neck=Norms() if identity else TopDown(cfg['fpn_dim']),
    head_width=cfg['head_dim'],
    head_layers=cfg['head_num_layers'],
    head_norm=cfg['head_with_ln'],
    prior=cfg['train_cfg']['cls_prior_prob'],
  )


def official_names(path: str, model: TemporalDetector) -> list[str]:
  """Return the official names of the tensors that are one of our parameters."""
  if path == 'scale':
    return [f'reg_head.scale.{i}.scale' for i in range(model.levels)]
  if m := re.match(r'pyramid/blocks_(\d+)/', path):
    i, stem = int(m[1]), model.pyramid.stem
    place = f'stem/{i}' if i < stem else f'branch/{i - stem}'
    path = f'blocks/{place}/{path[m.end() :]}'
  m = re.fullmatch(r'blocks/(\w+)/(\d+)/attn/(\w+)', path)
  if m and m[3] in _JOINT:
    start = f'backbone.{m[1]}.{m[2]}.attn.'
    return [f'{start}{x}{_JOINT[m[3]]}' for x in ('query', 'key', 'value')]
  path = re.sub(r'(norm_\d+|ln\d)/scale$', r'\1/weight', path)
  path = re.sub(r'/kernel$', '/weight', path)
  for pattern, name in _NAMES:
    if re.match(pattern, path):
      return [re.sub(pattern, name, path)]
  raise AssertionError(f'no official name for {path}')


def to_ours(path: str, x: list[np.ndarray], shape) -> np.ndarray:
  """Return official tensors as the parameter at a path."""
  if path.endswith('conv_kernel'):  # three of [C, 1, taps]
    return np.stack([y[:, 0].T for y in x], axis=1)
  if path.endswith('attn/kernel'):
    return np.stack([y[..., 0].T for y in x])
  if path.endswith('kernel') and x[0].ndim == 3 and len(shape) == 3:
    return x[0].transpose(2, 1, 0)
  if path.endswith('kernel'):
    return x[0][..., 0].T
  return (np.stack(x) if len(x) > 1 else x[0]).reshape(shape)


def to_official(path: str, x: np.ndarray) -> list[np.ndarray]:
  """Return a parameter as official tensors, but for axes of length 1."""
  if path.endswith('conv_kernel'):
    return [x[:, i].T for i in range(3)]
  if path.endswith('attn/kernel'):
    return [y.T for y in x]
  if path.endswith('kernel'):
    return [x.transpose(2, 1, 0) if x.ndim == 3 else x.T]
  several = path == 'scale' or re.search('attn/(norm_.*|bias)$', path)
  return list(x) if several else [x]


def weights(model: TemporalDetector, arrays: dict, width: int):
  """Return the parameters of a case; every weight is used."""
  template = jax.eval_shape(
    model.init,
    jax.random.key(0),
    jnp.zeros((1, 64, width)),
    jnp.ones((1, 64), bool),
  )['params']
  left = {k[2:] for k in arrays if k.startswith('w/')}

  def take(path, leaf):
    names = official_names(path, model)
    left.difference_update(names)
    x = to_ours(path, [arrays[f'w/{n}'] for n in names], leaf.shape)
    assert x.shape == leaf.shape, path
    return x

  params = trees.map_with_path(take, template)
  assert not left, f'unused: {sorted(left)}'
  return params


def official(model: TemporalDetector, tree) -> dict[str, np.ndarray]:
  """Return a tree of our parameters in the official layout."""
  out = {}
  for path, x in trees.path_leaves(tree):
    names = official_names(path, model)
    tensors = to_official(path, np.asarray(x))
    out |= dict(zip(names, tensors, strict=True))
  return out


def align(
  found: Proposals, scores: np.ndarray, segments: np.ndarray
) -> Proposals:
  """Order proposals as recorded where scores are equal but for rounding.

  The recorded order among equal scores is that of a sort that is not stable.
  """
  if len(found.scores) != len(scores):
    return found
  apart = np.abs(found.segments[None] - segments[:, None]).max(-1)
  apart[~np.isclose(found.scores[None], scores[:, None], 1e-4, 1e-6)] = np.inf
  order = []
  for row in apart:
    order.append(int(row.argmin()))
    apart[:, order[-1]] = np.inf
  return found.take(np.array(order))
