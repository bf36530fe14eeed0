import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.objectives import base
from vfm_jax.objectives.balance import Balance

RNG = np.random.default_rng(0)
LAYERS, BATCH, COUNT = 3, 4, 5
ONES = jnp.ones(BATCH)
TAU = jnp.zeros(BATCH, jnp.int32)


def sown(gates, load=None, drawn=1.0):
  gates = jnp.asarray(gates, jnp.float32)
  load = (gates > 0).astype(jnp.float32) if load is None else load
  return {
    'prompt_gates': gates,
    'prompt_load': jnp.asarray(load),
    'prompt_drawn': jnp.full(len(gates), drawn),
  }


def weights(layers=LAYERS, batch=BATCH):
  x = RNG.random((layers, batch, COUNT)).astype(np.float32) + 0.1
  return x / x.sum(-1, keepdims=True)


def parts(values, valid=ONES, **kwargs):
  return Balance(**kwargs)(values, TAU, valid)[1]


def test_is_an_auxiliary_loss_with_factors():
  assert isinstance(Balance(), base.Auxiliary)
  values = sown(weights(), RNG.random((LAYERS, BATCH, COUNT)))
  for form in ('canonical', 'official'):
    total, named = Balance(2.0, 0.5, form)(values, TAU, ONES)
    want = 2.0 * named['importance'] + 0.5 * named['load']
    assert total == pytest.approx(float(want))


def test_canonical_is_the_variation_of_sums_over_the_batch():
  gates, load = weights(), RNG.random((LAYERS, BATCH, COUNT))
  got = parts(sown(gates, load))
  for name, x in (('importance', gates), ('load', load)):
    sums = x.sum(1)
    want = (sums.std(-1) / sums.mean(-1)) ** 2
    assert got[name] == pytest.approx(want.mean(), rel=1e-5)


def test_even_use_costs_nothing():
  even = np.full((LAYERS, BATCH, COUNT), 1 / COUNT, np.float32)
  for form in ('canonical', 'official'):
    got = parts(sown(even, drawn=0.0), form=form)
    assert got['importance'] == pytest.approx(0, abs=1e-9)
    assert got['load'] == 0
  # One prompt for each example is even over the batch, not in an example.
  turns = np.tile(np.eye(COUNT, dtype=np.float32), (LAYERS, 1, 1))
  ones = jnp.ones(COUNT)
  assert parts(sown(turns), ones)['importance'] == pytest.approx(0, abs=1e-9)
  assert parts(sown(turns), ones, form='official')['importance'] > 1


def test_official_importance():
  gates = weights()
  got = parts(sown(gates), form='official')['importance']
  sums = gates.sum(0)
  assert got == pytest.approx(sums.var(ddof=1) / sums.mean() ** 2, rel=1e-5)
  scaled = parts(sown(3 * gates), form='official')['importance']
  assert scaled == pytest.approx(float(got), rel=1e-5)
  alone = sown(gates[:, :1])
  assert parts(alone, jnp.ones(1), form='official')['importance'] == 0


def test_official_load():
  load = RNG.random((LAYERS, BATCH, COUNT))
  got = parts(sown(weights(), load), form='official')['load']
  assert got == pytest.approx(load.sum((1, 2)).mean(), rel=1e-5)
  # Where no noise decides the released code counts weights below zero.
  got = parts(sown(weights(), drawn=0.0), form='official')['load']
  assert got == 0


@pytest.mark.parametrize('form', ['canonical', 'official'])
def test_layers_without_prompts_and_invalid_examples_do_not_count(form):
  gates, load = weights(), RNG.random((LAYERS, BATCH, COUNT))
  want = parts(sown(gates, load), form=form)
  pad = lambda x: np.concatenate([x, 0 * x[:1]])  # noqa: E731
  values = sown(pad(gates), pad(load))
  more = {
    name: np.concatenate([x, x[:, :1]], 1) if x.ndim == 3 else x
    for name, x in values.items()
  }
  valid = jnp.array([1.0] * BATCH + [0.0])
  for got in (
    parts(values, form=form),
    parts(more, valid, form=form),
  ):
    for name in want:
      assert got[name] == pytest.approx(float(want[name]), rel=1e-5)
