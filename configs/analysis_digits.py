"""Look into a denoiser of `methods_digits.py`: how noise levels differ in it.

    python -m vfm_jax.main eval --config=configs/analysis_digits.py:dtr \
      --workdir=runs/study_digits/dtr/seed_0

for a run of `methods_digits.py:dtr`, and so for other methods, prints numbers
and writes pictures to `evals` in the work directory:

`levels` the held-out loss of 20 ranges of noise levels; `convergence` after how
many steps each had done 90 % of its fall (arXiv:2403.10348), with curves and
the loss by level; `entropy` how far the marginals of consecutive levels of the
digits are apart (same); `affinity` the cosines between gradients of 20 levels
(arXiv:2306.00354), whose file `ops.clustering.by_affinity` reads; `gates` which
channels or experts each level uses, for `dtr` and `switch`.

Ours: the setting; run on a network of a few steps alone.
"""

import pathlib

from vfm_jax.config import load, ref
from vfm_jax.evals.affinity import TaskAffinity
from vfm_jax.evals.convergence import Convergence
from vfm_jax.evals.gates import Gates
from vfm_jax.evals.marginals import RelativeEntropy

ROUTED = ('dtr', 'switch')


def get_config(arg=None):
  """Return the recipe of a method, to be looked into."""
  c = load(str(pathlib.Path(__file__).with_name(f'methods_digits.py:{arg}')))
  with c.unlocked():
    data = dict(data=c.data.val, batch_size=100)
    c.evals.convergence = ref(Convergence)
    c.evals.entropy = ref(RelativeEntropy, **data)
    c.evals.affinity = ref(TaskAffinity, count=200, **data)
    if arg in ROUTED:
      c.evals.gates = ref(Gates)
  return c
