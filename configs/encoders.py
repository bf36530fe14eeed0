"""Embed videos with a released encoder, whose weights you have in a file.

    python -m vfm_jax.main convert --verify --source=FILE \
      --config=configs/encoders.py:videomae_b --workdir=runs/videomae_b
    python -m vfm_jax.main embed --config=configs/encoders.py:videomae_b \
      --workdir=runs/videomae_b --dataset=NAME \
      --config.embed.val.source.root=DIR \
      --config.embed.val.source.csv=DIR/val.csv

and the same of `embed.train`. Variants name the encoder, see
`vfm_jax/released.py`; with `-eval`, as in `:clip_b-eval`, the verb `eval`
probes it. VideoMAE, V-JEPA and UMT are the pretrained ones; videomaev2_b and
videomaev2_s are distilled and fine-tuned. CLIP and dfn (arXiv:2309.17425) see
frames one by one, and their vectors are averaged. Frames and sizes are those of
the released weights. Ours: no released file was read; their layouts are tested
with random weights.
"""

from vfm_jax import optim, schedules
from vfm_jax.config import bind, ref, variant
from vfm_jax.data import augment, clips
from vfm_jax.data.folder import FolderCSV
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.evals.probes import Probes
from vfm_jax.experiment import Data, Experiment
from vfm_jax.released import ENCODERS


def get_config(arg=None):
  """Return the recipe of one encoder."""
  choices = {
    f'{name}{suffix}': (encoder, bool(suffix))
    for name, encoder in ENCODERS.items()
    for suffix in ('', '-eval')
  }
  encoder, probed = variant(arg, choices)

  def pipeline(split, path):
    return ref(
      Pipeline,
      source=ref(FolderCSV, root='data', csv=f'data/{split}.csv'),
      clip=bind(clips.uniform, frames=encoder.frames),
      transform=bind(augment.center_crop, size=encoder.pixels),
      path=path,
    )

  def splits(path):
    return {s: pipeline(s, f'{path}.{s}') for s in ('train', 'val')}

  evals = {}
  if probed:
    evals['probes'] = ref(
      Probes, **splits('evals.probes'), labels=('label',), cache=False
    )
  return ref(
    Experiment,
    objective=encoder.objective(),
    data=ref(Data, train=pipeline('train', 'data.train')),
    # Nothing is trained.
    optim=ref(
      optim.Optimizer,
      lr=schedules.constant,
      groups=(ref(optim.Group, pattern='.', freeze=True),),
    ),
    batch_size=8,
    steps=1,
    evals=evals,
    embed=splits('embed'),
  )
