"""Check that fine-tuning takes over what pretraining made."""

import pathlib
import re

import jax
import pytest

from vfm_jax import config, trees

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'


def experiment(spec):
  name, _, variant = spec.partition(':')
  suffix = f':{variant}' if variant else ''
  return config.build(config.load(f'{CONFIGS / name}.py{suffix}'))


def shapes(exp):
  """Return {path: shape} of the parameters, without reading any video."""
  spec = {
    'video': jax.ShapeDtypeStruct((1, 16, 224, 224, 3), 'uint8'),
    'labels': {'label': jax.ShapeDtypeStruct((1,), 'int32')},
    'row': jax.ShapeDtypeStruct((1,), 'int32'),
  }
  params = jax.eval_shape(exp.objective.init, jax.random.key(0), spec)[0]
  return {p: x.shape for p, x in trees.path_leaves(params)}, params


@pytest.mark.parametrize('variant', ['', 'lora'])
def test_the_recipe_starts_from_the_pretraining_recipe(variant):
  source, _ = shapes(experiment('videomae_b'))
  exp = experiment(f'finetune_videomae_b:{variant}')
  target, params = shapes(exp)

  def but(table, patterns):
    for pattern in patterns:
      assert any(re.search(pattern, p) for p in table), pattern
    return {
      p: s
      for p, s in table.items()
      if not any(re.search(pattern, p) for pattern in patterns)
    }

  start = exp.warm_start
  assert but(target, start.fresh) == but(source, start.ignore)
  _, rows = exp.optim.build(params, 100)
  frozen = {r.path for r in rows if r.frozen}
  assert frozen == (set(but(target, start.fresh)) if variant else set())
