"""Check the `sample` verb: what it writes, and what a sample depends on."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from vfm_jax import config, sharding, verbs
from vfm_jax.evals import samples
from vfm_jax.sampling import Sampling

RECIPES = pathlib.Path(__file__).parents[1] / 'recipes'


def experiment(name, **overrides):
  c = config.load(str(RECIPES / name))
  c.update_from_flattened_dict(overrides)
  return config.build(c)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A work directory as training leaves it; no step was taken."""
  exp = experiment('tiny_denoise.py', steps=3)
  workdir = str(tmp_path_factory.mktemp('run'))
  state = exp.first_state(exp.shardings(sharding.make_mesh(exp.mesh)))
  with exp.checkpointer(workdir) as saved:
    saved.save(3, state.replace(step=state.step + 3), force=True)
  return exp, workdir


def test_writes_samples_for_eyes_and_evaluators(run):
  exp, workdir = run
  written = verbs.sample(exp, workdir, count=5, labels=[2, 0])
  assert written['npz'].name == 'step_3.npz'
  with np.load(written['npz']) as arrays:
    assert arrays['arr_0'].shape == (5, 4, 16, 16, 3)
    assert arrays['arr_0'].dtype == np.uint8
    assert arrays['arr_1'].tolist() == [2, 0, 2, 0, 2]
  with Image.open(written['picture']) as picture:
    assert picture.n_frames == 4  # clips move


@pytest.mark.slow
def test_a_sample_depends_on_its_number_and_label_alone(run):
  exp, workdir = run
  mesh = sharding.make_mesh(exp.mesh)
  # At first the output is zero whatever the label: any other weights do.
  params = jax.tree.map(
    lambda p: 0.3 * jax.random.normal(jax.random.key(p.size), p.shape),
    exp.restore(workdir, mesh).params,
  )

  def draw(batch_size, labels=(0, 1, 2), seed=0, mesh=None):
    return samples.draw_samples(
      exp.objective,
      params,
      (4, 16, 16, 3),
      labels,
      count=8,
      seed=seed,
      batch_size=batch_size,
      mesh=mesh,
    ).astype(int)

  whole = draw(8)
  for other in (draw(3), draw(8, mesh=mesh)):
    # Products over another batch round differently: one grey level.
    assert np.abs(whole - other).max() <= 1
  relabelled = np.abs(whole - draw(8, labels=(0, 3, 2))).max((1, 2, 3, 4))
  assert (relabelled > 1).tolist() == [i % 3 == 1 for i in range(8)]
  assert np.abs(whole - draw(8, seed=1)).max((1, 2, 3, 4)).min() > 1


def test_mistakes_are_told(run):
  exp, workdir = run
  with pytest.raises(ValueError, match=r'labels from 0 to 3 .*found \[4\]'):
    verbs.sample(exp, workdir, labels=[1, 4])
  with pytest.raises(ValueError, match='Masked draws no samples'):
    verbs.sample(experiment('tiny_masked.py'), workdir)
  unlabelled = dataclasses.replace(
    exp.objective, label=None, sampling=Sampling(scale=2.0)
  )
  with pytest.raises(ValueError, match='guidance needs labels'):
    unlabelled.draw({}, jax.random.split(jax.random.key(0), 2), (2, 2, 3))
  with pytest.raises(ValueError, match='expected no labels to draw'):
    unlabelled.check_labels([1])
  with pytest.raises(TypeError, match='has no sample'):
    samples.draw_samples(object(), {}, (1,), None, count=1)
