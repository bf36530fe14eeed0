"""Train and score temporal action segmentation over an embedding store.

    python -m vfm_jax.main eval --config=configs/tas.py:50salads \
      --config.root=DIR --config.evaluators.tas.annotations=ANNOTATIONS

Variants: `50salads`, `gtea` (none is `gtea`), `breakfast`. `DIR/<dataset>/
multi-clip/train` holds `<video>_c.npy` of all videos, as `embed` writes them
with the window and stride below; ANNOTATIONS holds `mapping.txt`, `groundTruth`
and `splits`, as ASFormer ships them. One GPU; full attention over the longest
video of Breakfast (9,741 frames) takes about 2 GB.

Settings are those of the repository of the evaluation framework of TWLV-I
(arXiv:2408.11318; its paper prints a weight decay of 1e-4), its window mask
and its count of segments included: for the paper's windows and counts set
`--config.evaluators.tas.head.window=query` and `...tas.metrics=exact`.

| set | clip, stride (s) | TWLV-I ViT-L: mF1, edit, accuracy |
|---|---|---|
| 50Salads | 1.0, 0.25 | 80.60, 77.19, 84.75 |
| GTEA | 0.5, 0.125 | 88.43, 90.19, 82.29 |
| Breakfast | 0.5, 0.125 | 50.66, 62.80, 54.17 |

Ours: not run.
"""

from vfm_jax.config import ref, variant
from vfm_jax.evals.stored import StoredEvaluation
from vfm_jax.evals.tas import Segmentation
from vfm_jax.evals.tas_train import Training
from vfm_jax.models.temporal_segmentation import Segmenter


def get_config(arg=None):
  """Return the evaluation of `50salads`, `gtea` or `breakfast`."""
  sets = {
    '50salads': ('50Salads', 19, 5, 2, 30.0, 5e-4, 'sliding'),
    'gtea': ('GTEA', 11, 4, 1, 15.0, 5e-4, 'sliding'),
    'breakfast': ('Breakfast', 48, 4, 1, 15.0, 1e-4, 'full'),
  }
  name, classes, splits, rate, fps, lr, attend = variant(
    arg, {**sets, '': sets['gtea']}
  )
  head = ref(Segmenter, num_classes=classes, attend=attend, window='block')
  tas = ref(
    Segmentation,
    annotations=f'annotations/{name}',
    head=head,
    training=ref(Training, lr=lr),
    splits=tuple(range(1, splits + 1)),
    sample_rate=rate,
    fps=fps,
    metrics='released',
  )
  return ref(
    StoredEvaluation,
    root='embeddings',
    dataset=name,
    evaluators=dict(tas=tas),
    seed=1212,
  )
