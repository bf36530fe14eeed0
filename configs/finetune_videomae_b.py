"""Fine-tune a pretrained VideoMAE ViT-B on Kinetics-400.

    python -m vfm_jax.main --config=configs/finetune_videomae_b.py \
      --config.warm_start.workdir=RUN

`RUN` is the work directory of `videomae_b.py`, or the one into which `convert`
wrote a released pretraining file with that recipe. Variants: none for a pod or
8 GPUs, `:gpu1`, and `:lora` to train low-rank updates, fc_norm and head (ours).

VideoMAE (arXiv:2203.12602), the recipe after 800 epochs of pretraining, with
one sample a video: 80.0 % top-1 there. RandAugment and random erasing, which it
has, are not in this one. Ours: not run at full size.
"""

from vfm_jax import optim, schedules
from vfm_jax.config import bind, ref, variant
from vfm_jax.data import augment, clips
from vfm_jax.data.folder import FolderCSV
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.evals.multi_view import MultiView
from vfm_jax.experiment import Checkpoints, Data, Experiment, WarmStart
from vfm_jax.models.encoders import VideoViT
from vfm_jax.objectives.classify import Classify
from vfm_jax.objectives.low_rank import LowRank


def get_config(arg=None):
  """Return the recipe for a pod, `gpu1` or `lora`."""
  accum, lora = variant(
    arg, {'': (1, False), 'gpu1': (8, False), 'lora': (1, True)}
  )
  # The length of the published run, whatever the list that is given.
  batch, epochs, videos = 512, 100, 240_000
  root = 'data/kinetics400'
  vit = dict(size='B', num_classes=400, pooling='mean', norm='pooled')
  compute = dict(init_scheme='finetune', dtype='bfloat16', scan=True)
  encoder = ref(VideoViT, drop_path=0.1, **vit, **compute)
  objective = ref(Classify, encoder=encoder, label='label')
  fresh, groups = ('^encoder/(fc_norm|head)/',), ()
  if lora:
    objective, fresh = ref(LowRank, objective=objective), ('^lora/', *fresh)
    groups = (
      *(ref(optim.Group, pattern=p) for p in fresh),
      ref(optim.Group, pattern='.', freeze=True),
    )

  def split(name, **kwargs):
    where = dict(root=root, csv=f'{root}/{name}.csv', layout='list')
    return ref(Pipeline, source=ref(FolderCSV, **where), **kwargs)

  crop = bind(augment.random_resized_crop, size=224)
  transforms = (crop, bind(augment.horizontal_flip))
  train = split(
    'train',
    clip=bind(clips.videomae_dense_train),
    transform=ref(augment.Compose, transforms=transforms),
  )
  test = split(
    'val',
    clip=bind(clips.videomae_dense_test),
    transform=bind(augment.three_crops, size=224),
    views=15,
  )
  return ref(
    Experiment,
    objective=objective,
    data=ref(Data, train=train, workers=16),
    optim=ref(
      optim.Optimizer,
      method=bind(optim.adam, b2=0.999),
      lr=bind(
        schedules.warmup_cosine,
        peak=1e-3 * batch / 256,
        final=1e-6 * batch / 256,
        warmup_fraction=5 / epochs,
        ramp=schedules.closed_ramp,
      ),
      groups=groups,
      layer_decay=None if lora else 0.75,
    ),
    batch_size=batch,
    steps=epochs * videos // batch,
    accum=accum,
    warm_start=ref(
      WarmStart,
      workdir='runs/videomae_b',
      fresh=fresh,
      ignore=('^decoder/', '^encoder/norm/'),
    ),
    evals={'test': ref(MultiView, data=test, label='label')},
    checkpoint=ref(Checkpoints, every_steps=2000, every_minutes=30.0),
    log_every=50,
  )
