"""Run the recorded cases around the detector of actions in time.

Each runner takes the sidecar and the arrays of a case and returns what this
library computes for every `out/`, `out64/`, `grad/` and `gradnorm/` array,
driven by the sidecar.
"""

import re

import jax
import numpy as np

from vfm_jax.evals import nms
from vfm_jax.evals.tal_annotations import Instance, without_duplicates
from vfm_jax.evals.tal_data import Timing, Video, crop, stretch
from vfm_jax.evals.tal_decode import Decoding, Proposals, fuse
from vfm_jax.evals.tal_map import (
  Detections,
  interpolated_ap,
  mean_average_precision,
)
from vfm_jax.evals.tal_train import average_weights, learning_rate
from vfm_jax.ops import segments as segments_lib
from vfm_jax.ops.focal import sigmoid_focal


def run_f_tal_losses(meta: dict, arrays: dict) -> dict:
  cfg = meta['config']
  shared = dict(alpha=cfg['alpha'], gamma=cfg['gamma'])
  x, y = arrays['in/logits'], arrays['in/targets']
  soft = arrays['in/targets_smoothed']

  def focal(x):
    return sigmoid_focal(x, soft, **shared).sum()

  pred, truth = arrays['in/pred_offsets'], arrays['in/gt_offsets']

  def diou(pred):
    return segments_lib.diou_loss(pred, truth, eps=cfg['eps']).sum()

  def outputs(x, pred):
    plain = sigmoid_focal(x, y, alpha=None, gamma=1.0)
    return {
      'out/focal_none': sigmoid_focal(x, y, **shared),
      'out/focal_smoothed_sum': focal(x),
      'grad/focal_smoothed_sum': jax.grad(focal)(x),
      'out/focal_alpha_neg_gamma1': plain.mean(),
      'out/diou_none': segments_lib.diou_loss(pred, truth, eps=cfg['eps']),
      'out/diou_sum': diou(pred),
      'grad/diou_sum': jax.grad(diou)(pred),
      'out/giou_none': segments_lib.iou_loss(pred, truth, eps=cfg['eps']),
    }

  return jax.jit(outputs)(x, pred)


def run_f_tal_optim(meta: dict, arrays: dict) -> dict:
  out = {}
  for item in meta['config']['schedules']:
    name = f'out64/lr_{item["index"]}'
    per_epoch = item['iters_per_epoch']
    warmup = item['warmup_epochs'] * per_epoch if item['warmup'] else 0
    total = warmup + item['epochs'] * per_epoch
    milestones, gamma = None, 0.1
    if item['schedule_type'] == 'multistep':
      milestones = tuple(s * per_epoch for s in item['schedule_steps'])
      gamma = item['schedule_gamma']
    out[name] = learning_rate(
      np.arange(len(arrays[name])),
      total,
      peak=item['learning_rate'],
      warmup_steps=warmup,
      # torch's own cosine, used without a warm-up, ends at 0.
      final=1e-8 if warmup else 0.0,
      milestones=milestones,
      gamma=gamma,
    )
  average = arrays['in/ema_w_init']
  steps = []
  for i in range(len(arrays['out/ema_weights'])):
    average = average_weights(
      average, arrays[f'in/ema_w_{i}'], meta['config']['ema_decay']
    )
    steps.append(average)
  out['out/ema_weights'] = np.stack(steps)
  return out


def run_f_tal_nms(meta: dict, arrays: dict) -> dict:
  out = {}
  raw = meta['config']['raw']
  for item in meta['config']['batched']:
    i = item['index']
    found = Proposals(
      *(arrays[f'in/{part}_{i}'] for part in ('seg', 'score', 'label'))
    )
    decoding = Decoding(
      per_class=item['multiclass'],
      soft=item['use_soft_nms'],
      sigma=item['sigma'],
      iou_threshold=item['iou_threshold'],
      vote_threshold=item['voting_thresh'],
      max_segments=item['max_seg_num'],
      min_score=item['min_score'],
    )
    kept = decoding.thin_out(found, lone='nan')
    for part, value in zip(('seg', 'score', 'label'), kept, strict=True):
      out[f'out/{part}_{i}'] = value
    for m, method in enumerate(('hard', 'linear', 'gaussian')):
      index, scores = nms.soft_nms(
        found.segments,
        found.scores,
        method=method,
        sigma=raw['sigma'],
        threshold=raw['iou_threshold'],
        min_score=raw['min_score'],
      )
      rows = np.concatenate([found.segments[index], scores[:, None]], axis=1)
      out[f'out/softnms_m{m}_idx_{i}'] = index
      out[f'out/softnms_m{m}_dets_{i}'] = rows
    out[f'out/hardnms_idx_{i}'] = nms.hard_nms(
      found.segments, found.scores, threshold=raw['iou_threshold']
    )
  for name in arrays:
    if m := re.fullmatch(r'out/voting_set(\d+)_thr(\d+)', name):
      seg, score = (arrays[f'in/{p}_{m[1]}'] for p in ('seg', 'score'))
      kept, threshold = arrays[f'out/seg_{m[1]}'], float(f'0.{m[2][1:]}')
      out[name] = nms.vote(kept, seg, score, threshold, lone='nan')
  return out


def run_f_tal_map(meta: dict, arrays: dict) -> dict:
  out = {}
  for item in meta['config']:
    i = item['index']
    truth = {
      video: [
        Instance(a['segment'][0], a['segment'][1], a['label_id'])
        for a in entry['annotations']
      ]
      for video, entry in item['database'].items()
      if entry['subset'].lower() == item['split'].lower()
    }
    kept = [
      a for v in truth.values() for a in without_duplicates(v) if a[1] > a[0]
    ]
    assert len(kept) == item['num_gt_used']
    found = Detections(
      [item['video_names'][v] for v in arrays[f'in/pred_video_{i}']],
      np.stack([arrays[f'in/pred_{e}_{i}'] for e in ('start', 'end')], 1),
      arrays[f'in/pred_label_{i}'],
      arrays[f'in/pred_score_{i}'],
    )
    scores = mean_average_precision(
      truth, found, arrays[f'in64/tiou_{i}'], unknown='reindexed'
    )
    out[f'out64/ap_{i}'] = scores.ap
    out[f'out64/mAP_{i}'] = scores.by_overlap
    out[f'out64/average_mAP_{i}'] = scores.average
  out['out64/interp_ap'] = interpolated_ap(
    arrays['in64/prec'], arrays['in64/rec']
  )
  return out


def run_f_tal_score_fusion(meta: dict, arrays: dict) -> dict:
  cfg = meta['config']
  found = Proposals(
    np.stack([arrays['in/start'], arrays['in/end']], axis=1),
    arrays['in/score'],
    np.zeros(len(arrays['in/score']), int),
  )
  parts, videos = [], []
  for v, name in enumerate(cfg['video_names']):
    fused = fuse(
      found.take(arrays['in/video'] == v),
      np.array(cfg['cls_scores'][name]),
      topk=cfg['topk'],
      count=cfg['num_pred'],
    )
    parts.append(fused)
    videos.append(np.full(len(fused.scores), v))
  segments, scores, labels = map(np.concatenate, zip(*parts, strict=True))
  return {
    'out/video': np.concatenate(videos),
    'out/start': segments[:, 0],
    'out/end': segments[:, 1],
    'out/label': labels,
    'out64/score': scores,
  }


def run_f_tal_dataset(meta: dict, arrays: dict) -> dict:
  cfg = meta['config']
  out, items = {}, {}
  for item in cfg['items']:
    kind = item['kind']
    if 'crop' in item:
      how = item['crop']
      drawn = iter(how['randint_results'])
      video = crop(
        items[kind, how['video']],
        how['max_seq_len'],
        draw=lambda low, high, drawn=drawn: next(drawn),
        ratio=tuple(how['crop_ratio']),
        keep=how['trunc_thresh'],
      )
      assert not list(drawn)
      name = 'crop'
    else:
      name = item['video']
      x = arrays[f'in/{kind}_{name}_feats']
      length, overlap = cfg['clip_length'], cfg['overlap'][kind]
      resize = cfg['max_seq_len'] if kind == 'anet' else None
      timing = Timing(length, (1 - overlap) * length, resize)
      grid = timing.grid(len(x))
      fps = item['num_frames'] / item['duration']
      np.testing.assert_allclose(grid.step * fps, item['feat_stride'], 1e-6)
      np.testing.assert_allclose(
        grid.origin * fps, item['feat_num_frames'] / 2, 1e-6
      )
      spans = np.array([a['segment'] for a in item['annotations']])
      labels = np.array([a['label_id'] for a in item['annotations']])
      video = Video(
        x if resize is None else stretch(x, resize),
        grid.to_steps(spans),
        labels,
      )
      items[kind, name] = video
    out[f'out/{kind}_{name}_feats'] = video.features.T
    out[f'out/{kind}_{name}_segments'] = video.segments
    out[f'out/{kind}_{name}_labels'] = video.labels
  return out
