"""Find the shots of a film in frozen features, on CPU.

    python -m vfm_jax.main eval --config=configs/film_heads.py

after the commands of `film_shots.py`. Two heads are trained on 21 parts of the
film and scored on 8: `shots` finds shots as segments, `cuts` tells frames
within 0.25 s of a cut from all others. Variants: none for the features of
`film_shots.py`, `:random` for those at random weights. Ours: shots mAP@0.5 0.63
and 0.53, cuts F1@50 0.44 and 0.52, one seed.
"""

from vfm_jax.config import ref, variant
from vfm_jax.evals.stored import StoredEvaluation
from vfm_jax.evals.tal import Localization
from vfm_jax.evals.tal_data import Timing
from vfm_jax.evals.tal_train import HeadTraining
from vfm_jax.evals.tas import Segmentation
from vfm_jax.evals.tas_train import Training
from vfm_jax.models.temporal_localization import TemporalDetector
from vfm_jax.models.temporal_pyramid import Pyramid
from vfm_jax.models.temporal_segmentation import Segmenter

FOLDER = 'runs/film'


def get_config(arg=None):
  """Return the evaluation of trained features, or of `random` ones."""
  run = variant(arg, {'': 'film_shots', 'random': 'film_random'})
  pyramid = ref(Pyramid, windows=(9,) * 4, width=64, heads=2)
  shots = ref(
    Localization,
    annotations=f'{FOLDER}/shots.json',
    detector=ref(
      TemporalDetector, num_classes=1, pyramid=pyramid, head_width=64
    ),
    training=ref(
      HeadTraining,
      lr=2e-3,
      epochs=150,
      length=192,
      ranges=((0, 8), (8, 16), (16, 32), (32, 10_000)),
      ema=0.99,
    ),
    timing=ref(Timing, max_steps=160),
  )
  cuts = ref(
    Segmentation,
    annotations=f'{FOLDER}/cuts',
    head=ref(
      Segmenter,
      num_classes=2,
      width=64,
      depth=6,
      decoders=1,
      channel_dropout=0.0,
    ),
    training=ref(Training, lr=2e-3, epochs=100),
    sample_rate=3,
    fps=24.0,
  )
  return ref(
    StoredEvaluation,
    root=f'runs/{run}/embeddings',
    dataset='film',
    evaluators=dict(shots=shots, cuts=cuts),
  )
