"""Train small denoisers on a CPU with several multi-task methods at once.

    python -m vfm_jax.main --config=configs/combinations.py:NAME \
      --workdir=runs/NAME

Names, of `quickstart_diffusion.py`, real digits: `dtr_uw` masks channels by the
noise level (DTR) and weighs 8 tasks by their uncertainty (ANT);
`switch_curriculum` trains experts (Switch-DiT) on the noisiest levels first;
`dmp_switch` freezes what that run gave, and patches it with prompts (DMP);
`pcgrad_dtr_flow` projects conflicts of 4 tasks out of the gradients of a masked
network that learns a flow. Of `video_dit_quickstart.py`, real clips:
`ant_video` weighs 4 tasks, close in log-SNR, of a video denoiser. All numbers
are for the size. Ours: not run, but for two steps of each in small.
"""

import pathlib

from vfm_jax.config import load, ref, variant
from vfm_jax.experiment import WarmStart
from vfm_jax.models.prompts import dmp
from vfm_jax.models.routing import Routing
from vfm_jax.models.switch import switch
from vfm_jax.multitask import PCGrad, UncertaintyWeighting
from vfm_jax.nn.adaln import Hooks
from vfm_jax.objectives.balance import Balance
from vfm_jax.objectives.prior import DiffusionPrior
from vfm_jax.ops import noise
from vfm_jax.ops.clustering import by_log_snr
from vfm_jax.ops.curriculum import Curriculum
from vfm_jax.ops.intervals import uniform
from vfm_jax.ops.strata import Stratified
from vfm_jax.optim import Group


def get_config(arg=None):
  """Return the combination of this name."""
  base, combine = variant(
    arg,
    {
      'dtr_uw': ('quickstart_diffusion.py:', _dtr_uw),
      'switch_curriculum': ('quickstart_diffusion.py:', _switch_curriculum),
      'dmp_switch': ('quickstart_diffusion.py:', _dmp_switch),
      'pcgrad_dtr_flow': ('quickstart_diffusion.py:flow', _pcgrad_dtr),
      'ant_video': ('video_dit_quickstart.py:', _ant),
    },
  )
  config = load(str(pathlib.Path(__file__).with_name(base)))
  with config.unlocked():
    combine(config)
  return config


def _dtr_uw(config):
  config.objective.denoiser.hooks = ref(Hooks, mask=ref(Routing))
  _weigh(config, ref(uniform, count=8))


def _switch_curriculum(config):
  config.objective.denoiser.hooks = ref(switch)
  config.objective.auxiliary = ref(DiffusionPrior)
  ten = ref(uniform, count=10)
  config.objective.times = ref(Curriculum, clusters=ten, stage_steps=60)


def _dmp_switch(config):
  config.objective.denoiser.hooks = ref(dmp, count=16, base=ref(switch))
  config.objective.auxiliary = ref(Balance)
  config.optim.groups = (
    ref(Group, pattern='token_hook/'),
    ref(Group, pattern='prepare_hook/', lr_scale=10.0),
    ref(Group, pattern='.', freeze=True),
  )
  workdir, fresh = 'runs/switch_curriculum', r'.*/(token|prepare)_hook/.*'
  config.warm_start = ref(
    WarmStart, workdir=workdir, item='ema/0.995', fresh=(fresh,)
  )
  config.update(steps=600, eval_every=200)


def _pcgrad_dtr(config):
  config.objective.denoiser.hooks = ref(Hooks, mask=ref(Routing))
  _divide(config, ref(uniform, count=4))
  config.combine = ref(PCGrad, mean=True)


def _ant(config):
  _weigh(config, ref(by_log_snr, count=4, schedule=noise.cosine))


def _weigh(config, intervals):
  _divide(config, intervals)
  config.combine = ref(UncertaintyWeighting)
  rate = 0.025 / config.optim.lr.peak
  config.optim.groups = (ref(Group, pattern='^combine/', lr_scale=rate),)


def _divide(config, intervals):
  config.objective.tasks = intervals
  config.objective.times = ref(Stratified, intervals=intervals)
