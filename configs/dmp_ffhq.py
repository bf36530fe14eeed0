"""Patch a converged DiT-B/2 of FFHQ at 256 x 256 with prompts (DMP).

    python -m vfm_jax.main --config=configs/dmp_ffhq.py \
      --config.data.train.source.root=DIR \
      --config.objective.decoder.path=VAE \
      --config.warm_start.workdir=BASE

DIR and VAE are as in `dit_s2.py`, DIR of FFHQ; BASE is the work directory of
the DiT that is patched, trained without labels or written by `convert`, whose
average of 0.9999 is taken. The patched network has its noise schedule, here the
linear one, and the image size it was trained for. For another DiT set
`--config.objective.denoiser.size`.

Variants: `pt` tunes prompts without a gate, `ft` all parameters of the DiT
without prompts. Recipe: DMP (arXiv:2405.17825), 50 K steps of 128 for a DiT
that had 600 K; FID of DiT-B/2 6.27, and at 30 K steps 5.87 with prompts and
gate, 6.81 with prompts alone, 6.57 fine-tuned. Balancing losses are the
canonical ones; `--config.objective.auxiliary.form=official` takes those of the
released code. Ours: not run at full size.
"""

import pathlib

from vfm_jax.config import load, ref, variant
from vfm_jax.experiment import WarmStart
from vfm_jax.models import prompts
from vfm_jax.objectives.balance import Balance
from vfm_jax.optim import Group

KINDS = {'': 'DMP', 'pt': 'PT', 'ft': None}


def get_config(arg=None):
  """Return the recipe, or that of a control: `pt` or `ft`."""
  kind = variant(arg, KINDS)
  config = load(str(pathlib.Path(__file__).with_name('dit_b2.py')))
  with config.unlocked():
    denoiser = config.objective.denoiser
    denoiser.update(num_classes=0, label_dropout=0.0)
    config.objective.label = None
    config.objective.sampling.scale = 1.0
    config.data.train.source.root = 'data/ffhq256_latents/train'
    config.data.train.labels = ()
    config.latents.train.source.update(root='data/ffhq/train', label='')
    config.update(batch_size=128, steps=50_000, ema=(), eval_ema=None)
    config.update(eval_every=10_000)
    config.checkpoint.keep_every_steps = 10_000
    fresh = []
    if kind is not None:
      denoiser.hooks = ref(prompts.dmp, count=256, kind=kind)
      fresh.append('denoiser/blocks/token_hook/.*')
    if kind == 'DMP':
      config.objective.auxiliary = ref(Balance)
      fresh.append('denoiser/prepare_hook/.*')
    config.optim.groups = _groups(kind)
    config.warm_start = ref(
      WarmStart,
      workdir='runs/dit_b2_ffhq',
      item='ema/0.9999',
      fresh=tuple(fresh),
    )
  return config


def _groups(kind):
  """Return the groups: prompts, the gate ten times as fast, nothing else."""
  if kind is None:
    return ()
  groups = [ref(Group, pattern='token_hook/prompt_tokens')]
  if kind == 'DMP':
    groups.append(ref(Group, pattern='prepare_hook/', lr_scale=10.0))
  return (*groups, ref(Group, pattern='.', freeze=True))
