"""Train on the digits as the quickstart does and hold it to its promises."""

import json
import pathlib

import numpy as np
import pytest

from vfm_jax import config, train, verbs

RECIPE = pathlib.Path(__file__).parents[1] / 'configs/quickstart_diffusion.py'


def load(variant):
  return config.build(config.load(f'{RECIPE}:{variant}'))


def noised_digits(pipeline, sigma):
  """Return the digits with noise in [-1, 1], uint8 [N, H, W, 3]."""
  with pipeline.eval_batches(100) as batches:
    images = np.concatenate([b['video'] for b in batches])[:, 0]
  rng = np.random.default_rng(0)
  x = images / 127.5 - 1 + sigma * rng.standard_normal(images.shape)
  x = np.round(127.5 * (np.clip(x, -1, 1) + 1)).astype(np.uint8)
  return np.repeat(x, 3, axis=-1)


@pytest.mark.slow
@pytest.mark.parametrize('variant', ['', 'flow'])
def test_digits_show_what_was_asked_for(variant, tmp_path):
  exp = load(variant)
  train.train(exp, str(tmp_path))
  rows = map(json.loads, (tmp_path / 'metrics.jsonl').read_text().splitlines())
  name = 'digits/frechet_efficientnet_lite0_96_200_val500'
  distances = [row[name] for row in rows if name in row]
  assert len(distances) == 1 + exp.steps // exp.eval_every
  assert distances == sorted(distances, reverse=True)

  measured = load(f'{variant}-measure'.removeprefix('-'))
  found = verbs.evaluate(measured, str(tmp_path))
  assert found['classes/classifier_top1'] >= 0.98
  assert found['classes/agreement_n500'] >= 0.9
  noised = measured.evals['digits'].score(noised_digits(exp.data.val, 0.3))
  ((name, bound),) = noised.items()
  assert found[f'digits/{name}'] < bound
