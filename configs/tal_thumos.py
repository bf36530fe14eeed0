"""Train and score temporal action localisation on THUMOS14.

    python -m vfm_jax.main eval --config=configs/tal_thumos.py \
      --config.root=DIR --config.evaluators.tal.annotations=thumos14.json

`DIR/THUMOS14/multi-clip/train` holds `<video>_c.npy` and `<video>.json` of the
200 videos of the subset Validation, `val` of the 212 of Test: clips of 0.5 s
every 0.125 s, as `embed` writes them; `--config.evaluators.tal.sampling=None`
reads a folder without the level `multi-clip`. The annotations are in the layout
that ActionFormer passes on.

Variants: none, self-contained: the head names the 20 classes; `:external`: it
finds actions of any class, and the scores of another classifier in
`--config.evaluators.tal.external=FILE` name them. One GPU.

Settings are those of the repository of the evaluation framework of TWLV-I
(arXiv:2408.11318; its paper prints a rate of 1e-3), the choice of the best
epoch on the test videos included; numbers of the last epoch stand beside.
Published, TWLV-I ViT-L, mean mAP over 0.3 to 0.7: 58.75 self-contained, 53.63
external. Ours: not run.
"""

from vfm_jax.config import ref, variant
from vfm_jax.evals.stored import StoredEvaluation
from vfm_jax.evals.tal import Localization
from vfm_jax.evals.tal_data import Timing
from vfm_jax.evals.tal_decode import Decoding
from vfm_jax.evals.tal_train import HeadTraining
from vfm_jax.models.temporal_localization import TemporalDetector


def get_config(arg=None):
  """Return the self-contained evaluation, or `external`."""
  classes, external = variant(
    arg, {'': (20, None), 'external': (1, 'thumos14_cls_scores.pkl')}
  )
  return ref(
    StoredEvaluation,
    root='embeddings',
    dataset='THUMOS14',
    evaluators=dict(
      tal=ref(
        Localization,
        annotations='annotations/thumos14.json',
        detector=ref(TemporalDetector, num_classes=classes),
        training=ref(HeadTraining, lr=1e-4, epochs=45, batch=2),
        decoding=ref(Decoding, per_class=external is None),
        timing=ref(Timing, max_steps=6 * 2304),
        subsets=('Validation', 'Test'),
        external=external,
        select='best',
        benchmark='THUMOS14',
      )
    ),
    seed=1212,
  )
