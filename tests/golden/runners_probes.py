"""Run the recorded cases of the probes on frozen features.

Each runner takes the sidecar and the arrays of a case and returns what this
library computes for every `out/` and `out64/` array, driven by the sidecar.
"""

import re

import jax.numpy as jnp
import numpy as np

from vfm_jax.evals.base import Features, top1
from vfm_jax.evals.knn import KNN
from vfm_jax.evals.linear import (
  Linear,
  LinearProbe,
  fit,
  predict,
  rows_of,
)


def run_f_knn(meta: dict, arrays: dict) -> dict:
  cfg = meta['config']
  classes = cfg['num_classes']
  bank, bank_labels = arrays['in/bank'], arrays['in/bank_labels']
  query, query_labels = arrays['in/query'], arrays['in/query_labels']
  out = {}

  plain = KNN(k=cfg['K'], temperature=cfg['T'], chunk=17)
  scores = plain.scores(bank, bank_labels, query, classes)
  out['out/scores'] = scores
  out['out/pred_top1'] = scores.argmax(-1)
  for name in arrays:
    if m := re.fullmatch(r'out/scores_k(\d+)_t([\d.]+)', name):
      other = KNN(k=int(m[1]), temperature=float(m[2]))
      out[name] = other.scores(bank, bank_labels, query, classes)

  sides = {
    'train': _sides(arrays, 'train', bank, bank_labels),
    'val': _sides(arrays, 'val', query, query_labels),
  }
  knn = KNN(k=cfg['knn_k'], temperature=cfg['knn_t'], bank_batch=cfg['tb'])
  for pair, log in cfg['official_main'].items():
    x, y = pair.split('_')
    train, val = sides['train'][x], sides['val'][y]
    items = knn.bank_items(len(train.y), cfg['seed_main'])
    result = knn.run(train, val, classes, seed=cfg['seed_main'])
    out[f'out/bank_train_index_{pair}'] = items
    out[f'out/scores_{pair}'] = result.scores
    out[f'out/pred_{pair}'] = result.predictions
    np.testing.assert_allclose(
      100 * result.top1, log['accuracy_percent'], atol=1e-6
    )
    dim, rows = re.findall(r'\d+', log['log_feature_bank'])
    assert train.take(items).x.shape == (int(rows), int(dim))
  return out


def run_f_linear_probe(meta: dict, arrays: dict) -> dict:
  cfg = meta['config']
  out = {}
  probe = LinearProbe(
    lr=cfg['base_lr'],
    batch=cfg['train_batch_size'],
    epochs=cfg['epochs'],
    warmup_epochs=cfg['warmup_epochs'],
  )
  adam = cfg['adam']
  assert (*adam['betas'], adam['eps'], adam['weight_decay']) == (
    0.9,
    0.999,
    1e-8,
    0,
  )
  train = _sides(
    arrays, 'train', arrays['in/train_video'], arrays['in/train_labels']
  )
  val = _sides(arrays, 'val', arrays['in/val_video'], arrays['in/val_labels'])
  for kind, log in cfg['log'].items():
    index = arrays[f'in/{kind}_batch_index']
    epochs, steps, batch = index.shape
    assert steps == probe.steps_per_epoch(len(train[kind].y))
    assert batch == probe.batch_of(len(train[kind].y))
    choice = arrays['in/clip_choice'] if kind == 'clip' else 0 * index
    rows = rows_of(train[kind], index, choice).reshape(-1, batch)
    start = Linear(
      jnp.asarray(arrays[f'w/{kind}.fc.weight'].T),
      jnp.asarray(arrays[f'w/{kind}.fc.bias']),
    )
    result = probe.run(
      train[kind], val[kind], cfg['num_classes'], params=start, rows=rows
    )
    out[f'out64/{kind}_lrs'] = result.lrs
    out[f'out/{kind}_losses'] = result.losses
    out[f'out/{kind}_weight_final'] = np.asarray(result.params.kernel).T
    out[f'out/{kind}_bias_final'] = np.asarray(result.params.bias)
    for name in arrays:
      if m := re.fullmatch(rf'out/{kind}_weight_after(\d+)', name):
        n = int(m[1])
        early, _ = fit(start, train[kind], rows[:n], result.lrs[:n])
        out[name] = np.asarray(early.kernel).T
    for line in log:
      epoch, total, accuracy = re.match(
        r'Epoch \[(\d+)/(\d+)\], Accuracy: ([\d.]+)', line
      ).groups()
      assert int(total) == epochs
      n = int(epoch) * steps
      params, _ = fit(start, train[kind], rows[:n], result.lrs[:n])
      got = top1(predict(params, val[kind]), val[kind].y)
      np.testing.assert_allclose(100 * got, float(accuracy), atol=1e-4)

  for name in arrays:
    if m := re.fullmatch(r'out64/lr_default_(\d+)ep_(\d+)it', name):
      default = LinearProbe(epochs=int(m[1]), batch=1)
      out[name] = default.learning_rates(int(m[2]))
  lr, warmup, total, min_lr = re.search(
    r'create_scheduler\(([\d.e-]+), (\d+), (\d+), min_lr=([\d.e-]+)\)',
    meta['mapping']['lr_minlr'],
  ).groups()
  other = LinearProbe(
    lr=float(lr),
    batch=1,
    epochs=int(total),
    warmup_epochs=int(warmup),
    min_lr=float(min_lr),
  )
  out['out64/lr_minlr'] = other.learning_rates(1)
  return out


def _sides(arrays, split, video, labels):
  """Return the features of a split with one vector a video, and with clips."""
  clips = [
    rows[:n]
    for rows, n in zip(
      arrays[f'in/{split}_clips'],
      arrays[f'in/{split}_num_clips'],
      strict=True,
    )
  ]
  return {
    'video': Features.of_videos(video, labels),
    'clip': Features.of_clips(clips, labels),
  }
