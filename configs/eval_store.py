"""Evaluate an embedding store: no encoder, no checkpoint, no video.

    python -m vfm_jax.main eval --config=configs/eval_store.py \
      --config.root=DIR --config.dataset=Kinetics400

`DIR/<dataset>/[uniform|multi-clip/]{train,val}` holds `<id>.json`,
`<id>_c.npy` and `<id>_v.npy`, as `embed` writes them and as the published
archives of the TWLV-I evaluation framework (arXiv:2408.11318) have them.
Numbers are printed, and written to `<workdir>/results` for the report.

Variants: none for the uniform embeddings, `:multi-clip` for those of windows of
2 s (kNN over clips and over videos), `:flat` for a folder without that level,
`:maps` for PCA, LDA and t-SNE of ten classes of the uniform ones. All but the
last also train the offline linear probe.

Published, TWLV-I ViT-L on Kinetics-400, kNN: uniform 65.97, clip 70.82, video
69.88. Ours: not run.
"""

from vfm_jax.config import ref, variant
from vfm_jax.evals.embedding_maps import EmbeddingMaps
from vfm_jax.evals.knn import KNN
from vfm_jax.evals.linear import LinearProbe
from vfm_jax.evals.stored import StoredEvaluation
from vfm_jax.evals.stored_probes import StoredProbe


def get_config(arg=None):
  """Return the evaluation of a store."""

  def probe(kind, **kwargs):
    # The seeds of the official scripts.
    seed = 12 if kind is KNN else 1212
    return ref(StoredProbe, probe=ref(kind), seeds=(seed,), **kwargs)

  def both(sampling):
    return dict(
      knn=probe(KNN, sampling=sampling),
      linear=probe(LinearProbe, sampling=sampling),
    )

  clip = dict(sampling='multi-clip', rows='clip')
  evaluators = variant(
    arg,
    {
      '': both('uniform'),
      'multi-clip': dict(
        knn_clip=probe(KNN, **clip),
        linear_clip=probe(LinearProbe, **clip),
        **both('multi-clip'),
      ),
      'flat': both(None),
      'maps': dict(maps=ref(EmbeddingMaps, random_classes=10)),
    },
  )
  return ref(
    StoredEvaluation,
    root='embeddings',
    dataset='Kinetics400',
    evaluators=evaluators,
  )
