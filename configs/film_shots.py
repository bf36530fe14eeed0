"""Learn from a film and embed it, to find its shots (`film_heads.py`), on CPU.

    python -m pip download --no-deps --no-binary :all: moviepy==2.2.1
    tar xzf moviepy-2.2.1.tar.gz
    unzip -d film "moviepy-2.2.1/docs/_static/medias/getting_started/\
moviepy_10_minutes/moviepy_10_minutes.zip"
    python -m vfm_jax.data.shots \
      film/moviepy_10_minutes/resources/bbb.mp4 runs/film
    python -m vfm_jax.main --config=configs/film_shots.py
    python -m vfm_jax.main embed --config=configs/film_shots.py \
      --dataset=film --sampling=multi-clip
    python -m vfm_jax.main eval --config=configs/film_heads.py

The film is Big Buck Bunny (CC-BY 3.0), 10 minutes; any other will do. It is cut
into parts of 20 s, its shots are found by colour; a small masked encoder learns
from the parts for training and embeds windows of 0.5 s every 0.125 s.

Variants: none; `:random` takes one step at a rate of 0, to compare with: give
it `--workdir=runs/film_random`. Ours: all of it; numbers are in the README.
"""

import pathlib

from vfm_jax.config import bind, load, ref, variant
from vfm_jax.data import augment, clips
from vfm_jax.data.folder import FolderCSV
from vfm_jax.data.pipeline import Pipeline

FOLDER = 'runs/film'


def _random(c):
  c.steps = 1
  c.optim.lr.update(peak=0.0, final=0.0, warmup_steps=1)


def get_config(arg=None):
  """Return the recipe, or `random`."""

  def pipeline(split, clip, path):
    listed = f'{FOLDER}/{split}.csv'
    source = dict(root=f'{FOLDER}/videos', csv=listed, label_columns=())
    return ref(
      Pipeline,
      source=ref(FolderCSV, **source),
      clip=clip,
      transform=bind(augment.center_crop, size=32),
      path=path,
    )

  c = load(str(pathlib.Path(__file__).with_name('quickstart.py')))
  drawn = bind(clips.videomae_dense_train, frames=8, stride=1)
  windows = bind(clips.multi_clip, frames=8, window=0.5, stride=0.125)
  with c.unlocked():
    for split in ('train', 'val'):
      c.data[split] = pipeline(split, drawn, f'data.{split}')
    c.embed = {
      # Heads for segmentation read all videos in one place.
      'train': pipeline('all', windows, 'embed.train'),
      'val': pipeline('val', windows, 'embed.val'),
    }
    c.evals, c.eval_at_start, c.steps = {}, False, 500
    variant(arg, {'': lambda c: None, 'random': _random})(c)
  return c
