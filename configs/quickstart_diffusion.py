"""Train a small class-conditional diffusion transformer on real digits, on CPU.

    python -m vfm_jax.main --config=configs/quickstart_diffusion.py
    python -m vfm_jax.main sample --config=configs/quickstart_diffusion.py

Variants: none for Gaussian diffusion (DiT, arXiv:2212.09748); `flow` for
linear interpolants with velocity prediction (SiT, arXiv:2401.08740). 4,500
digits of 28 x 28 pixels, without latents. Pictures of the average of the
weights appear in `media/` during training. At the start and every 500 steps
the Frechet distance of 200 samples to 500 held-out digits is measured with
EfficientNet-lite0. `:measure` and `:flow-measure` are for the verb `eval`: 500
samples, and how often a classifier of real digits sees in them the class that
was asked for, which takes two minutes more.

What made digits legible in minutes: patches of 7 pixels (16 tokens; 64 tokens
of 4 pixels cost four times as much and had seen too few digits), and for
Gaussian diffusion v instead of the noise on a cosine schedule; for `flow` times
near the middle (arXiv:2403.03206), embedded from 0 to 1000: embedded from 0 to
1, as in SiT, the features of the time hardly differ. Ours, all.
"""

import itertools

from vfm_jax import optim, samplers, schedules, solvers
from vfm_jax.config import bind, ref, variant
from vfm_jax.data import augment, clips
from vfm_jax.data.digits import Digits
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.evals.agreement import Agreement
from vfm_jax.evals.generation import Generation
from vfm_jax.evals.networks import EfficientNetLite0
from vfm_jax.experiment import Checkpoints, Data, Experiment
from vfm_jax.models.dit import DiT
from vfm_jax.objectives.denoise import Denoise
from vfm_jax.ops import noise
from vfm_jax.ops.diffusion import Gaussian, unit_range
from vfm_jax.ops.interpolants import Interpolant, logit_normal
from vfm_jax.ops.runge_kutta import Fixed
from vfm_jax.sampling import Sampling


def get_config(arg=None):
  """Return the recipe for Gaussian diffusion, or `flow`, to `measure` it."""
  processes = {
    '': (
      ref(Gaussian, schedule=noise.cosine, predicts='v', variance='small'),
      bind(samplers.ddim, steps='25', restrict=unit_range),
    ),
    'flow': (
      ref(Interpolant, density=logit_normal, time_scale=1000.0),
      bind(solvers.ode, solver=ref(Fixed, method='heun'), num_steps=13),
    ),
  }
  parts = itertools.product(processes, ('', 'measure'))
  chosen, measure = variant(arg, {'-'.join(filter(None, p)): p for p in parts})
  process, sampler = processes[chosen]

  def pipeline(split, path):
    return ref(
      Pipeline,
      source=ref(Digits, split=split, pad=0),
      clip=bind(clips.uniform, frames=1),
      transform=augment.identity,
      path=path,
    )

  train = pipeline('train', 'data.train')
  val = pipeline('val', 'data.val')
  evals = {
    'digits': ref(
      Generation,
      reference=val,
      features=ref(EfficientNetLite0, size=96),
      count=500 if measure else 200,
      batch_size=100,
    )
  }
  if measure:
    evals['classes'] = ref(
      Agreement, train=train, val=val, count=500, epochs=18
    )
  return ref(
    Experiment,
    objective=ref(
      Denoise,
      denoiser=ref(
        DiT,
        size='S',
        width=192,
        depth=4,
        heads=6,
        patch=7,
        input_size=28,
        channels=1,
        learn_sigma=False,
        num_classes=10,
      ),
      process=process,
      data='video',
      sampling=ref(Sampling, sampler=sampler, scale=3.0),
    ),
    data=ref(Data, train=train, val=val),
    optim=ref(
      optim.Optimizer,
      lr=bind(
        schedules.warmup_cosine, peak=1.5e-3, final=1e-5, warmup_steps=100
      ),
      method=bind(optim.adam, b2=0.99),
      weight_decay=0.0,
      clip_norm=1.0,
    ),
    batch_size=64,
    steps=1500,
    ema=(0.995,),
    eval_ema=0.995,
    log_every=100,
    evals=evals,
    eval_every=500,
    eval_at_start=True,
    checkpoint=ref(Checkpoints, every_steps=500),
  )
