"""Compare four ways to pretrain a small video encoder, on CPU.

    python -m vfm_jax.main study --config=configs/study_pretraining.py

trains each method of `pretraining_mocap.py` with three seeds in
`runs/study_pretraining`, and writes the table and the appearance-versus-motion
plane of `docs/study_pretraining.md`. `:twlv` and the like are the recipes of
single methods. Needs the `mocap` extra (CPython 3.11); half an hour on 2 cores.
Ours: the setting.
"""

import pathlib

from vfm_jax.comparison import Arm, Comparison
from vfm_jax.config import load, ref

NOTES = {
  'untrained': 'the encoder at random weights.',
  'pixels': 'pixels of hidden tokens (`Masked`, as in the quickstart).',
  'vjepa': 'V-JEPA: features that a slow copy gives hidden blocks '
  '(`LatentPrediction`).',
  'umt': 'as UMT: features that EfficientNet-lite0, in the place of CLIP, '
  'gives visible tokens (`Distill`).',
  'twlv': 'the sum of the last two on one mask (`Twlv`), a reconstruction of '
  'what TWLV-I may do.',
}
ABOUT = """A ViT of {width} features and {depth} blocks sees 8 frames of 32 x 32
pixels of 15 recorded human motions, {steps:,} steps of {batch} clips, then is
frozen. `view`, the side from which the camera looks (chance 0.25), is told by a
single frame; `action` (chance 0.067) by motion and pose. Clips to learn from
show 8 camera angles, those that are scored 4 others. Probes read the mean of
all tokens (kNN, linear) or attend to them (attentive, the better of two rates).
`pixels8` is what the clips themselves give, shrunk to 8 x 8."""
PROBES = {'kNN': 'probes/{}_knn20_top1', 'linear': 'probes/{}_linear150ep_top1'}
PROBES['attentive'] = 'attentive/{}_attentive40ep_best_of_2_top1'


def get_config(arg=None):
  """Return the comparison, or the recipe of a method."""
  methods = pathlib.Path(__file__).with_name('pretraining_mocap.py')
  if arg:
    return load(f'{methods}:{arg}')
  recipes = {name: load(f'{methods}:{name}') for name in NOTES}
  measures = {}
  for recipe in recipes.values():
    with recipe.unlocked():
      measures, recipe.evals = recipe.evals.copy_and_resolve_references(), {}
  pixels = recipes['pixels']
  return ref(
    Comparison,
    arms=tuple(
      ref(Arm, name=name, experiment=recipe, note=NOTES[name])
      for name, recipe in recipes.items()
    ),
    measures=measures,
    levels=None,
    planes={
      title: (name.format('view'), name.format('action'))
      for title, name in PROBES.items()
    },
    report='docs/study_pretraining',
    title='Ways to pretrain a video encoder, on motion capture',
    about=ABOUT.format(
      **pixels.objective.encoder, steps=pixels.steps, batch=pixels.batch_size
    ),
  )
