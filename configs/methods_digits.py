"""Train a small DiT on real digits by a method of multi-task denoising, on CPU.

    python -m vfm_jax.main --config=configs/methods_digits.py:dtr

Methods (`METHODS`) are as in the papers but for what so few steps ask for: a
patience of 2 for 200, and the learning rate of `dmp` and its control `ft`, that
go on from `warm_start.workdir`. MEME is as in `meme_ffhq.py`. Ours: all sizes.
"""

import pathlib

from vfm_jax import multitask
from vfm_jax.config import ConfigDict, bind, load, ref, variant
from vfm_jax.evals.difficulty import Difficulty
from vfm_jax.experiment import WarmStart
from vfm_jax.models import prompts, routing, switch
from vfm_jax.nn import adaln, mixer
from vfm_jax.objectives import balance, experts, prior
from vfm_jax.ops import clustering, curriculum, noise, strata
from vfm_jax.optim import Group

STEPS, MORE, LR, DIT = 1000, 250, 2e-3, 'runs/study_digits/dit/seed_0'


def _hooks(c, hooks, auxiliary=None):
  c.objective.denoiser.hooks = hooks
  c.objective.auxiliary = auxiliary


def _ant(c, combine):
  cosine = bind(noise.cosine)
  clusters = ref(clustering.by_log_snr, count=5, schedule=cosine)
  times = ref(strata.Stratified, intervals=clusters)
  c.objective.update(tasks=clusters, times=times)
  c.combine = combine


def _ant_uw(c):
  _ant(c, ref(multitask.UncertaintyWeighting))
  c.optim.groups = (ref(Group, pattern='^combine/', lr_scale=0.025 / LR),)


def _paced(c, order):
  c.objective.times = ref(curriculum.Curriculum, order=order, patience=2)


def _meme(c):
  networks = []
  for i, own in enumerate((0.8, 0.4, 0.2, 0.1)):
    one = c.objective.copy_and_resolve_references()
    one.times = ref(strata.SoftInterval, interval=i, own=own)
    one.denoiser.update(mixing=ref(mixer.thirds, expert=i), scan=False)
    networks.append(one)
  c.objective = ref(experts.Experts, experts=tuple(networks))


def _ft(c):
  c.update(steps=MORE, eval_every=MORE // 5, ema=(), eval_ema=None)
  c.optim.lr.update(peak=LR / 3, warmup_steps=20)
  c.warm_start = ref(WarmStart, workdir=DIT, item='ema/0.99')


def _dmp(c):
  _ft(c)
  _hooks(c, ref(prompts.dmp, count=16), ref(balance.Balance))
  gate = ref(Group, pattern='prepare_hook/', lr_scale=10.0)
  rest = ref(Group, pattern='.', freeze=True)
  c.optim.groups = (ref(Group, pattern='token_hook/'), gate, rest)
  c.warm_start.fresh = ('denoiser/.*_hook/.*',)


METHODS = {
  'dit': lambda c: None,
  'dtr': lambda c: _hooks(c, ref(adaln.Hooks, mask=ref(routing.Routing))),
  'switch': lambda c: _hooks(c, ref(switch.switch), ref(prior.DiffusionPrior)),
  'ant_uw': _ant_uw,
  'ant_pcgrad': lambda c: _ant(c, ref(multitask.PCGrad, mean=True)),
  'ant_nash': lambda c: _ant(c, ref(multitask.Nash)),
  'dmp': _dmp,
  'ft': _ft,
  'curriculum': lambda c: _paced(c, 'easy_to_hard'),
  'anti_curriculum': lambda c: _paced(c, 'hard_to_easy'),
  'meme': _meme,
}


def get_config(arg=None):
  """Return the recipe of a method."""
  c = load(str(pathlib.Path(__file__).with_name('quickstart_diffusion.py')))
  with c.unlocked():
    c.objective.denoiser.update(width=128, depth=4, heads=4, scan=True)
    c.objective.sampling.sampler.steps = '10'
    levels = ref(Difficulty, data=c.data.val, count=100, batch_size=100)
    c.evals = ConfigDict({'levels': levels})
    c.update(batch_size=40, steps=STEPS, eval_every=STEPS // 5, log_every=25)
    c.update(ema=(0.99,), eval_ema=0.99)
    c.optim.lr.update(peak=LR, warmup_steps=50)
    variant(arg, METHODS)(c)
  return c
