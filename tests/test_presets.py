"""Check on eight devices that each preset computes what one device does.

And what it costs: memory by the layout, collectives by the compiled module.
"""

import functools
import math
import pathlib

import jax
import numpy as np
import pytest

from vfm_jax import config, hlo, presets, sharding, trees
from vfm_jax.config import ref
from vfm_jax.models.switch import switch
from vfm_jax.objectives.prior import DiffusionPrior

RECIPES = pathlib.Path(__file__).parent / 'recipes'
CONFIGS = RECIPES.parents[1] / 'configs'
EXPERTS = 4

PRESETS = {
  'dp': presets.dp(),
  'fsdp': presets.fsdp(),
  'fsdp_tensor': presets.fsdp_tensor(2),
  'sequence': presets.sequence(2),
  'experts': presets.experts(2),
}


def recipe(model):
  """Return a tiny scanned model; no two of its sizes are alike by accident."""
  if model == 'masked':
    c = config.load(str(RECIPES / 'tiny_masked.py'))
    c.objective.encoder.update(scan=True, width=48)
    c.objective.decoder.update(scan=True, width=32, depth=2)
  else:
    c = config.load(str(RECIPES / 'tiny_denoise.py'))
    # As many layers as there are neither examples nor experts on a device.
    c.objective.denoiser.update(scan=True, width=48, depth=3)
  # Gradients that differ from zero by rounding must not become whole steps.
  c.optim.method.eps = 1e-6
  if model == 'switch':
    with c.unlocked():
      c.objective.denoiser.hooks = ref(switch, experts=EXPERTS)
      c.objective.auxiliary = ref(DiffusionPrior)
  return c


@functools.cache
def compiled(model, preset, devices=8):
  """Return (experiment, mesh, compiled step)."""
  c = recipe(model)
  if preset is not None:
    c.mesh.update(vars(PRESETS[preset]))
  exp = config.build(c)
  mesh = sharding.make_mesh(exp.mesh, jax.devices()[:devices])
  with sharding.activations(mesh):
    batch = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), exp.batch_spec
    )
    step = exp.jitted_step(mesh)
    lowered = step.lower(exp.abstract_state, batch, exp.teacher_spec)
    return exp, mesh, lowered.compile()


def train(model, preset, devices=8, steps=5):
  """Return (parameters, losses) after some steps."""
  exp, mesh, step = compiled(model, preset, devices)
  state, losses = exp.first_state(exp.shardings(mesh)), []
  with exp.data.train.train_batches(exp.batch_size, seed=0) as batches:
    for _ in range(steps):
      batch = sharding.put_batch(next(batches), mesh)
      state, metrics = step(state, batch, exp.teachers(mesh))
      losses.append(float(metrics['loss']))
  return jax.device_get(state.params), losses


@functools.cache
def alone(model):
  return train(model, None, devices=1)


MODELS = pytest.mark.parametrize('model', ['masked', 'dit', 'switch'])


@pytest.mark.slow
@MODELS
@pytest.mark.parametrize('preset', PRESETS)
def test_five_steps_equal_one_device(model, preset):
  params, losses = train(model, preset)
  want, expected = alone(model)
  np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5),
    params,
    want,
  )


def layers_of(exp):
  """Return {path: shape of one layer} of the parameters."""
  return {
    path: x.shape[1:] if trees.STACKED.search(path) else x.shape
    for path, x in trees.path_leaves(exp.abstract_state.params)
  }


def instructions(step):
  module = hlo.parse(step.as_text())
  return [i for c in module.computations.values() for i in c]


@pytest.mark.slow
@MODELS
def test_fsdp_gathers_parameters_and_no_activations(model):
  exp, _, step = compiled(model, 'fsdp')
  width = 48
  layers = set(map(tuple, map(sorted, layers_of(exp).values())))
  # The three products of the fused kernel [D, 3, H, D/H].
  layers |= {(width, width), (32, 32)}
  kinds = {}
  for i in instructions(step):
    kinds.setdefault(i.opcode.removesuffix('-start'), []).append(i)
  gathered = 0
  for i in kinds['all-gather']:
    for shape in i.results:
      if not shape.dtype.startswith(('f', 'bf')):
        continue  # labels, for the table that is cut
      if i.op_name.endswith('top_k'):
        # A few gates an example.
        assert shape.dims[1:] == (EXPERTS,)
        continue
      assert tuple(sorted(shape.dims)) in layers, i.text
      gathered += 1
  assert gathered > 10
  assert 'collective-permute' not in kinds


@pytest.mark.slow
@MODELS
@pytest.mark.parametrize('preset', [p for p in PRESETS if p != 'dp'])
def test_no_whole_stack_of_parameters(model, preset):
  """Read all arrays of the module: none is the size of a stack of layers."""
  exp, mesh, step = compiled(model, preset)
  places = dict(trees.path_leaves(exp.shardings(mesh).params))
  leaves = dict(trees.path_leaves(exp.abstract_state.params))
  stacks = {
    x.shape: path
    for path, x in leaves.items()
    if trees.STACKED.search(path) and not places[path].is_fully_replicated
  }
  # Biases that are cut over heads look like norms, which are whole.
  for path, x in leaves.items():
    if places[path].is_fully_replicated:
      stacks.pop(x.shape, None)
  assert stacks
  found = {
    (stacks[shape.dims], i.text)
    for i in instructions(step)
    for shape in i.results
    if shape.dims in stacks
  }
  assert not found
  # What the step is given is what the layout says.
  state = zip(
    jax.tree.leaves(exp.abstract_state),
    jax.tree.leaves(exp.shardings(mesh)),
    strict=True,
  )
  held = sum(sharding.device_bytes(x, s) for x, s in state)
  batch = sum(
    math.prod(x.shape) * x.dtype.itemsize
    for x in jax.tree.leaves(exp.batch_spec)
  )
  given = step.memory_analysis().argument_size_in_bytes
  assert held <= given <= held + batch


@pytest.mark.parametrize(
  'name',
  [
    'videomae_l',
    *(
      pytest.param(n, marks=pytest.mark.slow)
      for n in ('dit_xl2', 'switch_dit:xl2')
    ),
  ],
)
def test_memory_falls_with_the_number_of_devices(name):
  file, _, variant = name.partition(':')
  exp = config.build(config.load(f'{CONFIGS / file}.py:{variant}'))
  state = exp.abstract_state

  def held(ways):
    places = sharding.infer(state, {'fsdp': ways}, exp.rules)
    return sum(
      sharding.device_bytes(x, s)
      for x, s in zip(
        jax.tree.leaves(state), jax.tree.leaves(places), strict=True
      )
    )

  whole = held(1)
  for ways in (2, 4, 8):
    assert whole / ways <= held(ways) <= 1.1 * whole / ways
