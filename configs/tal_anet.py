"""Train and score temporal action localisation on ActivityNet 1.3.

    python -m vfm_jax.main eval --config=configs/tal_anet.py \
      --config.root=DIR --config.evaluators.tal.annotations=anet1.3.json

`DIR/ANet/multi-clip/{train,val}` hold `v_<video>_c.npy` and `v_<video>.json` of
the subsets training and validation: clips of 0.5 s every 0.25 s, as `embed`
writes them; each video is stretched to 192 steps. The annotations are the
release of ActivityNet; videos that can't be had any more are left out of
training and count as missed (`missing='skip'`), actions that end before they
start are dropped.

Variants: none, self-contained: the head names the 200 classes; `:external`: it
finds actions of any class, and the scores of another classifier in
`--config.evaluators.tal.external=FILE` name them. One GPU.

Settings are those of the repository of the evaluation framework of TWLV-I
(arXiv:2408.11318; its paper prints a rate of 1e-4), the choice of the best
epoch on the scored videos included; numbers of the last epoch stand beside.
Published, TWLV-I ViT-L, mean mAP over 0.5 to 0.95: 34.98 self-contained, 39.49
external. Ours: not run.
"""

from vfm_jax.config import ref, variant
from vfm_jax.evals import tal_map
from vfm_jax.evals.stored import StoredEvaluation
from vfm_jax.evals.tal import Localization
from vfm_jax.evals.tal_data import Timing
from vfm_jax.evals.tal_decode import Decoding
from vfm_jax.evals.tal_train import HeadTraining
from vfm_jax.models.temporal_localization import TemporalDetector
from vfm_jax.models.temporal_pyramid import Pyramid


def get_config(arg=None):
  """Return the self-contained evaluation, or `external`."""
  classes, external = variant(
    arg, {'': (200, None), 'external': (1, 'anet_cls_scores.json')}
  )
  return ref(
    StoredEvaluation,
    root='embeddings',
    dataset='ANet',
    evaluators=dict(
      tal=ref(
        Localization,
        annotations='annotations/anet1.3.json',
        detector=ref(
          TemporalDetector,
          num_classes=classes,
          pyramid=ref(Pyramid, windows=(7, 7, 7, 7, 7, -1)),
        ),
        training=ref(
          HeadTraining,
          lr=1e-3,
          epochs=10,
          batch=16,
          length=192,
          normaliser=200.0,
        ),
        decoding=ref(
          Decoding,
          per_class=external is None,
          sigma=0.75,
          vote_threshold=0.9,
          max_segments=100,
          min_duration=0.001,
        ),
        timing=ref(Timing, stride=0.25, resize=192),
        subsets=('training', 'validation'),
        overlaps=tal_map.ACTIVITYNET,
        external=external,
        prefix='v_',
        duplicates='drop',
        invalid='drop',
        missing='skip',
        cut=True,
        select='best',
        benchmark='ANet',
      )
    ),
    seed=1212,
  )
