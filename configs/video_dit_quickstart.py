"""Train a small diffusion transformer on real video clips, on a CPU.

    python -m vfm_jax.main --config=configs/video_dit_quickstart.py
    python -m vfm_jax.main sample --config=configs/video_dit_quickstart.py

Variants: none attends over space and then over time in each block; `:joint`
over all tokens at once. 8 frames of 32 x 32 pixels of seven shots, which are
the labels, without latents; tokens of 4 x 8 x 8. Pictures and animations of the
average of the weights appear in `media/` during training.

The network predicts the clean clip: in runs of 200 steps with smaller tokens,
samples of one that predicts the noise or v were still noise.

Ours: stopped after 1,000 of 1,500 steps, in pieces on 2 busy cores, 700 of them
with the rate of a run of 2,000; the length of a whole run was not measured. The
loss is then 0.038. Samples have the colours of the shot and hardly change
between the frames of a token, but tokens don't join to a scene, nor do the two
halves in time: it shows that the parts work, not that the model has learnt
video. `:joint` was run for two steps only.
"""

from vfm_jax import optim, samplers, schedules
from vfm_jax.config import bind, ref, variant
from vfm_jax.data import augment, clips
from vfm_jax.data.embedded import CameraClips
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.experiment import Checkpoints, Data, Experiment
from vfm_jax.models.dit import DiT
from vfm_jax.objectives.denoise import Denoise
from vfm_jax.ops import noise
from vfm_jax.ops.diffusion import Gaussian, unit_range
from vfm_jax.sampling import Sampling


def get_config(arg=None):
  """Return the recipe for factorised attention, or `joint`."""
  attention = variant(arg, {'': 'factorised', 'joint': 'joint'})

  def pipeline(path, **source):
    return ref(
      Pipeline,
      source=ref(CameraClips, **source),
      clip=bind(clips.uniform, frames=8),
      transform=augment.identity,
      path=path,
    )

  return ref(
    Experiment,
    objective=ref(
      Denoise,
      denoiser=ref(
        DiT,
        size='S',
        width=192,
        depth=4,
        heads=6,
        patch=8,
        tubelet=4,
        frames=8,
        channels=3,
        learn_sigma=False,
        num_classes=7,
        attention=attention,
      ),
      process=ref(
        Gaussian, schedule=noise.cosine, predicts='x0', variance='small'
      ),
      data='video',
      label='scene',
      sampling=ref(
        Sampling,
        sampler=bind(samplers.ddim, steps='50', restrict=unit_range),
        scale=2.0,
      ),
    ),
    data=ref(
      Data,
      train=pipeline('data.train', windows=512),
      val=pipeline('data.val', split='val', windows=2),
    ),
    optim=ref(
      optim.Optimizer,
      lr=bind(schedules.warmup_cosine, peak=1e-3, final=1e-5, warmup_steps=100),
      weight_decay=0.0,
    ),
    batch_size=32,
    steps=1500,
    ema=(0.995,),
    eval_ema=0.995,
    log_every=100,
    eval_every=500,
    checkpoint=ref(Checkpoints, every_steps=500),
  )
