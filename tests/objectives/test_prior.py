import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vfm_jax import sharding, step
from vfm_jax.models import switch
from vfm_jax.models.dit import SIZES, DiT
from vfm_jax.nn.adaln import Hooks
from vfm_jax.objectives import base, prior
from vfm_jax.objectives.denoise import Denoise
from vfm_jax.objectives.prior import DiffusionPrior, HeldPrior

L, E, K, B = 3, 3, 2, 4
RNG = np.random.default_rng(0)
TAU = np.array([3, 250, 610, 999])
ONES = np.ones(B, np.float32)
LN2 = np.log(2)


def values(seed=0):
  """Return gates that turn smoothly with the noise level."""
  rng = np.random.default_rng(seed)
  t = np.linspace(0, 3, 1000)[:, None]
  logits = np.sin(t * rng.normal(size=(L, 1, E)) + rng.normal(size=(L, 1, E)))
  levels = np.exp(4 * logits) / np.exp(4 * logits).sum(-1, keepdims=True)
  return {
    switch.GATES: levels[:, TAU].astype(np.float32),
    switch.TOP: np.argsort(-levels, -1)[..., :K].astype(np.int32),
  }


@functools.partial(jax.jit, static_argnums=0)
def score(auxiliary, values, tau=TAU, valid=ONES):
  return auxiliary(values, tau, valid)


@pytest.mark.parametrize('size', SIZES)
def test_the_prior_is_as_wide_as_what_a_level_uses(size):
  depth = SIZES[size].depth
  table = np.asarray(prior.prior_columns(3 * depth, 2 * depth))
  assert (table.sum(1) == 2 * depth).all()
  assert table.shape == (1000, 3 * depth)


def test_divergence():
  p = RNG.dirichlet(np.ones(6), 5).astype(np.float32)
  q = RNG.dirichlet(np.ones(6), 5).astype(np.float32)
  got = np.asarray(prior.divergence(p, q))
  assert ((got > 0) & (got < LN2)).all()
  middle = (p + q) / 2
  want = (p * np.log(p / middle) + q * np.log(q / middle)).sum(1) / 2
  np.testing.assert_allclose(got, want, atol=1e-4)
  np.testing.assert_allclose(prior.divergence(p, p), 0, atol=1e-7)
  apart = np.eye(2, dtype=np.float32)
  far = prior.divergence(apart[:1], apart[1:])
  np.testing.assert_allclose(far, LN2, atol=1e-4)


def test_cost_counts_the_levels_that_differ():
  used = RNG.integers(0, 2, (1000, 4))
  table = RNG.integers(0, 2, (1000, 4))
  got = prior.matching_cost(jnp.asarray(used), jnp.asarray(table))
  want = np.abs(used[:, :, None] - table[:, None]).sum(0)
  np.testing.assert_array_equal(got, want)


def test_a_shuffled_prior_is_found_again():
  table = np.asarray(prior.prior_columns(L * E, L * K))
  order = np.random.default_rng(1).permutation(L * E)

  @jax.jit
  def match(used):
    return DiffusionPrior().match(prior.matching_cost(used, table))

  found = match(table[:, order])
  np.testing.assert_array_equal(table[:, found], table[:, order])


def test_loss_and_metrics():
  found = values()
  loss, metrics = score(DiffusionPrior(), found)
  assert 0 < loss < LN2
  np.testing.assert_allclose(metrics['prior_jsd'], loss)
  assert 0.5 < metrics['prior_agreement'] < 1
  # Examples that do not count, count for nothing.
  valid = np.array([1, 1, 0, 0], np.float32)
  gates = found[switch.GATES].copy()
  gates[:, 2:] = 1 / 3
  masked, _ = score(DiffusionPrior(), found, valid=valid)
  other = {**found, switch.GATES: gates}
  again, _ = score(DiffusionPrior(), other, valid=valid)
  np.testing.assert_allclose(masked, again, rtol=1e-6)


def test_names_of_experts_do_not_matter():
  found = values()
  order = np.array([2, 0, 1])
  places = np.argsort(order)
  renamed = {
    switch.GATES: found[switch.GATES][..., order],
    switch.TOP: places[found[switch.TOP]].astype(np.int32),
  }
  want, _ = score(DiffusionPrior(), found)
  got, _ = score(DiffusionPrior(), renamed)
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_shuffled_columns_are_as_good_a_matching():
  found = values()
  _, want = score(DiffusionPrior(), found)
  shuffled = DiffusionPrior(shuffle=5)
  loss, got = score(shuffled, found)
  assert got['prior_agreement'] == want['prior_agreement']
  np.testing.assert_array_equal(score(shuffled, found)[0], loss)
  first = prior._orders(5, TAU, 9)[0]
  assert (first != prior._orders(5, TAU + 1, 9)[0]).any()
  assert (first != prior._orders(6, TAU, 9)[0]).any()


def test_the_gradient_goes_to_the_gates():
  found = values()
  gates = found[switch.GATES]

  @jax.jit
  def graded(gates, weight):
    def loss(gates):
      auxiliary = DiffusionPrior(weight)
      return auxiliary({**found, switch.GATES: gates}, TAU, ONES)[0]

    return jax.value_and_grad(loss)(gates)

  _, grad = graded(gates, 1.0)
  step = 1e-2 * gates * RNG.normal(size=gates.shape).astype(np.float32)
  change = graded(gates + step, 1.0)[0] - graded(gates - step, 1.0)[0]
  np.testing.assert_allclose(change, 2 * (grad * step).sum(), rtol=0.02)
  loss, grad = graded(gates, 0.0)
  assert loss == 0
  assert not np.any(grad)


def objective(auxiliary, hooks):
  model = DiT(
    width=16,
    depth=2,
    heads=2,
    patch=4,
    input_size=8,
    channels=3,
    num_classes=0,
    label_dropout=0.0,
    hooks=hooks,
    scan=True,
  )
  return Denoise(model, label=None, auxiliary=auxiliary)


BATCH = {
  'image': RNG.integers(0, 255, (B, 8, 8, 3)).astype(np.uint8),
  'row': np.arange(B),
}


def test_in_training():
  task = objective(DiffusionPrior(weight=0.7), switch.switch(E, top_k=K))
  assert isinstance(task.auxiliary, base.Auxiliary)
  params, _ = jax.eval_shape(task.init, jax.random.key(0), BATCH)
  rng = np.random.default_rng(3)
  draw = lambda s: 0.2 * rng.normal(size=s.shape).astype(np.float32)  # noqa: E731
  params = jax.tree.map(draw, params)

  @jax.jit
  def graded(params):
    def loss(params):
      out = task.loss(params, {}, BATCH, jax.random.key(1), train=True)
      return out.aux, (out.sums / out.counts, out.metrics)

    return jax.value_and_grad(loss, has_aux=True)(params)

  (aux, (main, metrics)), grads = graded(params)
  np.testing.assert_allclose(aux, 0.7 * metrics['prior_jsd'], rtol=1e-6)
  np.testing.assert_allclose(main, [metrics['denoising']], rtol=1e-6)
  network = grads['denoiser']
  hook = network['blocks']['mask_hook']
  assert np.any(hook['gate']['kernel'])
  assert np.any(network['t_embed']['fc1']['kernel'])
  for untouched in (hook['experts'], network['blocks']['attn']):
    assert not any(np.any(g) for g in jax.tree.leaves(untouched))


def test_a_matching_is_held_for_some_steps():
  held = HeldPrior(every=3)
  assert isinstance(held, base.Holds)
  seen = [values(seed) for seed in range(5)]
  refresh, state = jax.jit(held.refresh), held.init(seen[0])
  matches = []
  for found in seen:
    state = refresh(state, found, TAU)
    matches.append(np.asarray(state.match))
    # Another microbatch of the step makes the same.
    again = refresh(state, found, TAU)
    np.testing.assert_array_equal(again.match, state.match)
    loss, _ = jax.jit(held)(found, TAU, ONES, state=state)
    if state.age == 0:
      want, _ = score(DiffusionPrior(), found)
      np.testing.assert_allclose(loss, want, rtol=1e-6)
    state = held.after_update(state)
  same = [np.array_equal(a, b) for a, b in itertools.pairwise(matches)]
  assert same == [True, True, False, True]
  # In evaluation there is no state, and it is matched anew.
  got, _ = score(held, seen[1])
  np.testing.assert_allclose(got, score(DiffusionPrior(), seen[1])[0])
  with pytest.raises(ValueError, match=r'auxiliary\.every` of 1 or more'):
    HeldPrior(every=0)


@pytest.mark.slow
def test_a_held_matching_is_part_of_the_state():
  task = objective(HeldPrior(every=2), switch.switch(E, top_k=K))
  tx = optax.sgd(0.1)
  make = lambda: step.init_state(task, tx, 0, BATCH)  # noqa: E731
  state = jax.jit(make)()
  mesh = sharding.make_mesh(sharding.Mesh())
  sharding.infer(jax.eval_shape(make), mesh)
  run = jax.jit(step.make_train_step(task, tx, accum=2))
  ages = []
  for _ in range(3):
    state, metrics = run(state, BATCH)
    ages.append(int(state.extra['auxiliary'].age))
    assert np.isfinite(metrics['loss'])
  assert ages == [1, 0, 1]
  match = np.asarray(state.extra['auxiliary'].match)
  assert sorted(match) == list(range(2 * E))


def test_a_network_without_gates_is_refused():
  task = objective(DiffusionPrior(), Hooks())
  params, _ = jax.eval_shape(task.init, jax.random.key(0), BATCH)
  with pytest.raises(ValueError, match=r"needs 'switch_gates', which nothing"):
    jax.eval_shape(
      lambda p: task.loss(p, {}, BATCH, jax.random.key(1), train=True), params
    )
