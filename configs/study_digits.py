"""Compare the methods of `methods_digits.py` on real digits, on CPU.

    python -m vfm_jax.main study --config=configs/study_digits.py

trains each with three seeds in `runs/study_digits`, one run after the other,
and writes table and figure of `docs/study_digits.md`. The same command goes on
after an interruption: what is finished is kept. `:dtr` and the like are the
recipes of single methods.

All methods have equal steps and batches, and the parameters of DiT plus what
they add, which the table counts; MEME has four networks. Ours: the setting.
Run once, beside other programs: table and figure are in `docs`.
"""

import pathlib

from vfm_jax.comparison import Arm, Comparison
from vfm_jax.config import load, ref
from vfm_jax.evals.agreement import Agreement
from vfm_jax.evals.generation import Generation
from vfm_jax.evals.networks import EfficientNetLite0

ANT = 'ANT, 5 clusters by log-SNR with as many examples each, '
CURRICULUM = '20 clusters, {} first, with a patience of 2 steps.'
NOTES = {
  'dit': 'plain DiT.',
  'dtr': 'DTR, windows of 0.8 of the channels, alpha 4.',
  'switch': 'Switch-DiT, 2 of 3 experts, prior loss of weight 1.',
  'ant_uw': f'{ANT}uncertainty weighting.',
  'ant_pcgrad': f'{ANT}PCGrad: 5 backward passes a step.',
  'ant_nash': f'{ANT}Nash-MTL that bargains every 25 steps.',
  'dmp': 'DMP, 16 prompts a block and a gate, on the frozen `dit` of the same '
  'seed, which is not converged at so few steps.',
  'ft': 'the control of `dmp`: all parameters of that `dit`, trained as long.',
  'curriculum': f'curriculum, {CURRICULUM.format("the noisy ones")}',
  'anti_curriculum': f'its reverse, {CURRICULUM.format("the clean ones")}',
  'meme': 'MEME, 4 DiTs with mixers, reconstructed; each has a quarter of each '
  'batch, so that steps, examples and compute are equal, not parameters.',
}
ABOUT = """Small class-conditional DiTs learn 4,500 digits of 28 x 28: {width}
features, {depth} blocks, patches of {patch} pixels, v on a cosine schedule,
batches of {batch}. The held-out loss is that of {count} digits, the mean of 20
equal ranges of noise levels. Pictures take {steps} steps of DDIM with guidance
{scale:g}; all runs draw them from the same noise, and one classifier reads them
all."""


def get_config(arg=None):
  """Return the comparison, or the recipe of a method."""
  methods = pathlib.Path(__file__).with_name('methods_digits.py')
  if arg:
    return load(f'{methods}:{arg}')
  recipes = {name: load(f'{methods}:{name}') for name in NOTES}
  dit, some = recipes['dit'], dict(count=200, batch_size=100)
  # Apart from the arm's own, for an override of one not to change the other.
  data = dit.data.copy_and_resolve_references()
  train, val = data.train, data.val
  lite0 = ref(EfficientNetLite0, size=96)
  return ref(
    Comparison,
    arms=tuple(
      ref(
        Arm,
        name=name,
        experiment=recipe,
        note=NOTES[name],
        start='dit' if name in ('dmp', 'ft') else None,
      )
      for name, recipe in recipes.items()
    ),
    measures={
      'digits': ref(Generation, reference=val, features=lite0, **some),
      'classes': ref(Agreement, train=train, val=val, epochs=10, **some),
    },
    distance='digits/frechet',
    report='docs/study_digits',
    title='Methods of multi-task denoising, on digits',
    about=ABOUT.format(
      **dit.objective.denoiser,
      batch=dit.batch_size,
      count=dit.evals.levels.count,
      steps=dit.objective.sampling.sampler.steps,
      scale=dit.objective.sampling.scale,
    ),
  )
