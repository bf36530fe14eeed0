# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Masked video pretraining in five cells
#
# Take a recipe, change values, look at the clips, train, look at what the
# model reconstructs. Everything runs on a CPU in about a minute; in Colab run
# `pip install vfm_jax` from a clone first.

# %%
import tempfile

import jax
from IPython.display import Image

from vfm_jax import config, plots, train
from vfm_jax.data.synthetic import MovingShapes

# %% [markdown]
# A recipe is data. Each line of its text can be changed, here or as a flag
# (`--config.objective.mask.ratio=0.5`).

# %%
recipe = config.load('../configs/videomae_b.py')
recipe.objective.encoder.update(
  width=64, depth=2, heads=2, patch=8, frames=8, image_size=32, dtype='float32'
)
recipe.objective.decoder.update(width=32, depth=1, heads=2, dtype='float32')
recipe.objective.mask.ratio = 0.5
recipe.data.train.unlock()
recipe.data.train.source = config.ref(MovingShapes, count=256, size=40)
recipe.data.train.clip.update(frames=8, stride=1)
recipe.data.train.transform.size = 32
recipe.data.workers = 0
recipe.update(batch_size=16, steps=60, epochs=None, log_every=10)
recipe.optim.lr.update(peak=2e-3, final=0.0, warmup_fraction=0.1)
print(config.to_text(recipe)[:400], '...')

# %%
experiment = config.build(recipe)
with experiment.data.train.eval_batches(8) as batches:
  batch = next(batches)
workdir = tempfile.mkdtemp()
clips = {'clip': batch['video']}
Image(str(plots.clip_grid(clips, f'{workdir}/clips.png', clips=3)))

# %% [markdown]
# Train. The same loop runs on one CPU and on a pod.

# %%
print(jax.devices())
results = train.train(experiment, workdir, config=recipe)
print('loss', results['loss/first'], '->', results['loss/last'])

# %%
Image(f'{workdir}/curves.png')
