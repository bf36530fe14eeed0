"""Tell whether clusters of noise levels disturb each other, on digits, on CPU.

    python -m vfm_jax.main study --config=configs/transfer_digits.py

trains the DiT of `methods_digits.py` on 5 clusters by log-SNR together, and
five more on one cluster each, with three seeds, and writes the negative
transfer gap of each cluster (ANT, arXiv:2306.00354) to `study.md` in the work
directory: the held-out loss of the model of the cluster minus that of all.
`:together` and `:alone_0`, the cleanest, to `:alone_4` are single recipes.

A model of one cluster sees as many of its examples in as many steps, a fifth of
a batch, as the model of all does. Ours: the setting, and the loss in place of
what samples are like; not run.
"""

import pathlib

from vfm_jax.comparison import Arm, Comparison
from vfm_jax.config import bind, load, ref, variant
from vfm_jax.ops import noise
from vfm_jax.ops.clustering import by_log_snr
from vfm_jax.ops.strata import SoftInterval, Stratified

COUNT = 5
ARMS = {'together': None, **{f'alone_{i}': i for i in range(COUNT)}}


def get_config(arg=None):
  """Return the comparison, or the recipe of an arm."""
  if arg:
    return _recipe(variant(arg, ARMS))
  return ref(
    Comparison,
    arms=tuple(
      ref(Arm, name=name, experiment=_recipe(only))
      for name, only in ARMS.items()
    ),
    measures={},
    title='Negative transfer between noise levels, on digits',
  )


def _recipe(only):
  """Return the recipe of all clusters, or of one alone."""
  here = pathlib.Path(__file__)
  c = load(str(here.with_name('methods_digits.py:dit')))
  clusters = ref(by_log_snr, count=COUNT, schedule=bind(noise.cosine))
  with c.unlocked():
    c.evals.levels.intervals = clusters
    if only is None:
      c.objective.times = ref(Stratified, intervals=clusters)
    else:
      times = ref(SoftInterval, interval=only, intervals=clusters)
      c.objective.times = times
      c.batch_size //= COUNT
  return c
