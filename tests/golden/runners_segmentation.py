"""Run the recorded cases of temporal action segmentation.

Each runner takes the sidecar and the arrays of a case and returns what this
library computes for every asserted array, driven by the sidecar.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vfm_jax import trees
from vfm_jax.evals import tas_metrics, tas_train
from vfm_jax.evals.base import Held
from vfm_jax.evals.tas_data import resample
from vfm_jax.models.temporal_segmentation import (
  FrameAttention,
  Segmenter,
  losses,
)

RELEASED = dict(window='block', padding='included')
ATTENTION = {'sliding_att': 'sliding', 'normal_att': 'full'}
NAMES = (
  (r'^decoders\.(\d+)\.', r'decoder_\1/'),
  (r'^encoder\.', 'encoder/'),
  (r'layers\.(\d+)\.', r'layer_\1/'),
  (r'/conv_1x1\.', '/embed/'),
  (r'(layer_\d+)/embed/', r'\1/proj/'),
  (r'/conv_out\.', '/head/'),
  (r'feed_forward\.layer\.0\.', 'conv/'),
  (r'att_layer\.', 'attention/'),
  (r'attention/conv_out\.', 'attention/out/'),
  (r'(query|key|value)_conv\.', r'\1/'),
  (r'weight$', 'kernel'),
  (r'\.', '/'),
)


def path_of(name: str) -> str:
  """Return our path of an official parameter name."""
  for pattern, ours in NAMES:
    name = re.sub(pattern, ours, name)
  return name


def ours(x: np.ndarray, path: str) -> np.ndarray:
  """Return an official weight [out, in, k] in our layout."""
  if x.ndim < 2:
    return x
  x = x.transpose(2, 1, 0)
  return x if path.endswith('conv/kernel') else x[0]


def theirs(x: np.ndarray, path: str) -> np.ndarray:
  if x.ndim < 2:
    return np.asarray(x)
  x = np.asarray(x)
  return (x if path.endswith('conv/kernel') else x[None]).transpose(2, 1, 0)


def load(arrays: dict, prefix: str, template) -> dict:
  """Return parameters of the template's shapes; all must be there, no more."""
  given = {}
  for name, x in arrays.items():
    if name.startswith(f'w/{prefix}.'):
      path = path_of(name.removeprefix(f'w/{prefix}.'))
      given[path] = ours(x, path)

  def take(path, shape):
    x = jnp.asarray(given.pop(path))
    assert x.shape == shape.shape, path
    return x

  params = trees.map_with_path(take, template)
  assert not given, sorted(given)
  return params


def run_f_tas_dataset(meta: dict, arrays: dict) -> dict:
  out = {}
  for item in meta['config']:
    i = item['index']
    labels = arrays[f'out/target_rle_labels_{i}']
    # Labels of the sampled frames; the annotation itself is not in the case.
    y = np.repeat(labels, arrays[f'out/target_rle_lengths_{i}'])
    assert len(y) == item['num_frames']
    x = resample(arrays[f'in/feats_{i}'], len(y))
    out[f'out/feats_{i}_every16'] = x.T[:, ::16]
    runs = tas_metrics.segments(y)
    out[f'out/target_rle_labels_{i}'] = runs.labels
    out[f'out/target_rle_lengths_{i}'] = runs.ends - runs.starts
  return out


def run_f_tas_metrics(meta: dict, arrays: dict) -> dict:
  cfg, out = meta['config'], {}
  for name, data in cfg['datasets'].items():
    background = None
    if 'background' in data['classes']:
      background = data['classes'].index('background')
    scores = []
    for v in range(len(data['videos'])):
      predicted, truth = (
        unpack(arrays, f'in/{name}/{s}', v) for s in ('pred', 'gt')
      )
      scores.append(
        tas_metrics.score_video(predicted, truth, background, 'released')
      )
    out[f'out64/{name}/per_video'] = [
      [s.correct, s.frames, s.edit, *s.counts.ravel()] for s in scores
    ]
    owner, splits = arrays[f'in/{name}/split'], []
    for number, split in enumerate(np.unique(owner)):
      chosen = [s for s, o in zip(scores, owner, strict=True) if o == split]
      listed = data['split_list_lengths'][number]
      splits.append(tas_metrics.score_split(chosen, listed))
    out[f'out64/{name}/per_split'] = [list(s.values()) for s in splits]
    mean = list(tas_metrics.mean_over_splits(splits).values())
    np.testing.assert_allclose(mean[:5], data['mean_over_splits'], rtol=1e-6)
    logged = [float(x) for x in re.findall(r': ([\d.]+)', data['official_log'])]
    np.testing.assert_allclose(mean[:5], logged, atol=5.1e-3)
  for case in cfg['edge_cases']:
    check_edge_case(case)
  return out


def check_edge_case(case: dict) -> None:
  names = sorted({*case['pred'], *case['gt']})
  predicted, truth = (
    np.array([names.index(y) for y in case[s]]) for s in ('pred', 'gt')
  )
  background = names.index('background') if 'background' in names else None
  p, t = (
    tas_metrics.segments(y, background, 'released') for y in (predicted, truth)
  )
  labels, starts, ends = case['segments']
  assert [names[y] for y in p.labels] == labels, case['name']
  assert (p.starts.tolist(), p.ends.tolist()) == (starts, ends), case['name']
  edit = tas_metrics.edit_score(p.labels, t.labels, 'released')
  np.testing.assert_allclose(edit, np.float64(case['edit'][0]), rtol=1e-6)
  distance = tas_metrics.levenshtein(p.labels, t.labels)
  assert distance == case['edit_unnormalised'][0], case['name']
  for k in tas_metrics.OVERLAPS:
    expected = case[f'f{k}']
    try:
      got = tas_metrics.overlap_counts(p, t, k / 100, 'released').tolist()
    except ValueError:
      assert isinstance(expected, str), case['name']
      continue
    assert got == expected, case['name']


def unpack(arrays: dict, prefix: str, video: int) -> np.ndarray:
  """Return the labels of a video from its run lengths."""
  first, last = arrays[f'{prefix}_offset'][video : video + 2]
  return np.repeat(
    arrays[f'{prefix}_rle_label'][first:last],
    arrays[f'{prefix}_rle_length'][first:last],
  ).astype(int)


def run_f_tas_model(meta: dict, arrays: dict) -> dict:
  cfg, out = meta['config'], {}
  for name, model in cfg['models'].items():
    out |= run_model(name, model, cfg, arrays)
  for layer in cfg['att_layers']:
    i = layer['index']
    attention = FrameAttention(
      reach=layer['bl'],
      width=layer['dims'] // layer['r'],
      attend=ATTENTION[layer['att_type']],
      **RELEASED,
    )
    x, cross = (arrays[f'in/att{i}_x{j}'].transpose(0, 2, 1) for j in (1, 2))
    valid = arrays[f'in/att{i}_mask'][:, 0] > 0
    cross = cross if layer['stage'] == 'decoder' else None
    shapes = jax.eval_shape(attention.init, jax.random.key(0), x, cross, valid)[
      'params'
    ]
    given = {
      f'w/{i}.{k.removeprefix(f"w/att{i}.").replace("conv_out", "out")}': w
      for k, w in arrays.items()
      if k.startswith(f'w/att{i}.')
    }
    params = load(given, str(i), shapes)
    y = attention.apply({'params': params}, x, cross, valid)
    out[f'out/att{i}'] = y.transpose(0, 2, 1)
  plateau = tas_train.Plateau(cfg['adam']['lr'], **cfg['plateau'])
  out['out64/plateau_lr_after_step'] = [
    plateau.update(x) for x in arrays['in64/plateau_losses']
  ]
  return out


def run_model(name: str, model: dict, cfg: dict, arrays: dict) -> dict:
  assert model['r1'] == model['r2']
  head = Segmenter(
    num_classes=model['num_classes'],
    width=model['num_f_maps'],
    depth=model['num_layers'],
    decoders=model['num_decoders'],
    reduction=model['r1'],
    attend=ATTENTION[model['attn_type']],
    channel_dropout=0.0,
    dropout=0.0,
    **RELEASED,
  )
  shapes = jax.eval_shape(
    lambda: tas_train.init(head, jax.random.key(0), model['input_dim'])
  )
  params = load(arrays, name, shapes)
  groups = [[0, 1], [1]] if model['batched'] else [[0], [1]]
  batches = [
    batch([arrays[f'in/{name}_x{i}'].T for i in group],
          [arrays[f'in/{name}_y{i}'] for i in group])
    for group in groups
  ]  # fmt: skip
  out = {}

  @jax.jit
  def forward(params, x, valid):
    stages = head.apply({'params': params}, x, valid, method='stages')
    return jnp.stack([logits for logits, _ in stages]), stages[0][1]

  @jax.jit
  @jax.grad
  def grads_of(params, batch):
    x, y, valid = batch
    logits, _ = forward(params, x, valid)
    entropy, smooth = losses(logits, y, valid, padding='included')
    return (entropy + cfg['tmse_weight'] * smooth).sum()

  for i, (x, y, valid) in enumerate(batches):
    logits, feature = forward(params, x, valid)
    out[f'out/{name}_logits_b{i}'] = logits.transpose(0, 1, 3, 2)
    out[f'out/{name}_encoder_feature_b{i}'] = feature.transpose(0, 2, 1)
    if i == 0:
      entropy, smooth = losses(logits, y, valid, padding='included')
      out[f'out/{name}_ce_per_stage'] = entropy
      out[f'out/{name}_tmse_per_stage'] = smooth
  flat = dict(trees.path_leaves(grads_of(params, batches[0])))
  for key in arrays:
    kind, _, rest = key.partition('/')
    if kind in ('grad', 'gradnorm') and rest.startswith(f'{name}.'):
      path = path_of(rest.removeprefix(f'{name}.'))
      g = theirs(flat[path], path)
      if path.endswith('key/bias'):
        # What is added to all keys changes no softmax: 0 but for rounding.
        scale = np.linalg.norm(flat[path.replace('bias', 'kernel')])
        for x in (g, arrays[key]):
          assert np.linalg.norm(x) <= 1e-5 * scale, path
        out[key] = arrays[key]
        continue
      out[key] = g if kind == 'grad' else np.linalg.norm(g)
  for i in (0, 1):
    x = arrays[f'in/{name}_x{i}'].T[None]
    logits, _ = forward(params, x, np.ones(x.shape[:2], bool))
    predicted = np.asarray(logits[-1, 0].argmax(-1))
    out[f'out/{name}_predict_sr2_v{i}'] = np.repeat(predicted, 2)

  state, trained = optax.scale_by_adam().init(params), []
  for step, lr in enumerate(model['lr_used']):
    params, state, loss = tas_train.train_step(
      Held(head),
      cfg['adam']['weight_decay'],
      cfg['tmse_weight'],
      params,
      state,
      batches[step % len(batches)],
      lr,
      jax.random.key(0),
      step,
    )
    trained.append(loss)
  out[f'out/{name}_train_losses'] = trained
  flat = dict(trees.path_leaves(params))
  prefix = f'out/{name}_after{len(trained)}steps.'
  for key in arrays:
    if key.startswith(prefix):
      path = path_of(key.removeprefix(prefix))
      out[key] = theirs(flat[path], path)
  return out


def batch(xs: list, ys: list) -> tuple:
  """Pad videos to the longest."""
  longest = max(map(len, xs))
  pad = lambda x: np.pad(  # noqa: E731
    x, [(0, longest - len(x))] + [(0, 0)] * (x.ndim - 1)
  )
  return (
    np.stack([pad(x) for x in xs]),
    np.stack([pad(y) for y in ys]),
    np.stack([pad(np.ones(len(y), bool)) for y in ys]),
  )
