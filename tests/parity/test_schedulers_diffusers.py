"""Compare each step of the samplers with schedulers of `diffusers`, live.

Both sides step with the same smooth stand-in for a network and the same noise.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax import samplers, solvers
from vfm_jax.ops import diffusion, noise
from vfm_jax.ops.interpolants import Interpolant
from vfm_jax.ops.runge_kutta import Fixed

pytestmark = pytest.mark.parity

SHAPE = (2, 4, 4, 3)
KINDS = {'eps': 'epsilon', 'x0': 'sample', 'v': 'v_prediction'}
SCHEDULES = {'linear': noise.linear, 'squaredcos_cap_v2': noise.cosine}


@pytest.fixture(scope='module')
def diffusers():
  pytest.importorskip('torch')
  return pytest.importorskip('diffusers')


@pytest.fixture(scope='module')
def x():
  return np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


def network(lib, x, t, *, second=False):
  """Return an output [B, H, W, C], or [B, H, W, 2C] with variance values."""
  cat = jnp.concatenate if lib is jnp else lib.cat
  first = lib.sin(1.3 * x + 0.01 * t) + 0.2 * x
  return cat([first, lib.cos(3 * x - 0.02 * t)], -1) if second else first


def walk(peer, x, *, second=False, keep=lambda i: {}):
  """Return the states after each step of a scheduler [steps, B, H, W, C]."""
  import torch

  first = lambda z: z.permute(0, 3, 1, 2)  # noqa: E731
  z, out = torch.tensor(x), []
  for i, t in enumerate(peer.timesteps):
    output = network(torch, z, float(t), second=second)
    done = peer.step(first(output), t, first(z), **keep(i))
    z = done.prev_sample.float().permute(0, 2, 3, 1)
    out.append(z.numpy())
  return np.stack(out)


def ours(sampler, process, x, *, second=False, **kw):
  def denoise(x, t):
    t = t[:, None, None, None].astype(jnp.float32)
    return network(jnp, x, t, second=second)

  run = jax.jit(
    lambda x: sampler(denoise, process, x, record=lambda x, p: x, **kw)[1]
  )
  return np.asarray(run(x))


def precise(peer, process):
  """Give a scheduler our tables.

  It makes its own in float32, where 1 - abar of the cleanest steps keeps three
  digits; ours are float64. The rules of the steps stay its own.
  """
  import torch

  whole = process.respaced('').tables
  for name, table in (('betas', whole.beta), ('alphas_cumprod', whole.abar)):
    own = getattr(peer, name)
    np.testing.assert_allclose(own, table, rtol=1e-3, atol=1e-6)
    setattr(peer, name, torch.tensor(table))
  peer.alphas = 1 - peer.betas
  return peer


def assert_close(found, want):
  assert found.shape == want.shape
  np.testing.assert_allclose(
    found, want, rtol=1e-4, atol=1e-4 * np.abs(want).max()
  )


@pytest.mark.parametrize('predicts', KINDS)
@pytest.mark.parametrize(
  ('variance', 'theirs', 'clip', 'schedule'),
  [
    ('learned', 'learned_range', False, 'linear'),
    ('small', 'fixed_small', True, 'squaredcos_cap_v2'),
    ('large', 'fixed_large', False, 'linear'),
  ],
)
def test_ddpm(diffusers, x, predicts, variance, theirs, clip, schedule):
  import torch

  process = diffusion.Gaussian(
    predicts=predicts, variance=variance, schedule=SCHEDULES[schedule]
  )
  peer = diffusers.DDPMScheduler(
    beta_schedule=schedule,
    variance_type=theirs,
    prediction_type=KINDS[predicts],
    clip_sample=clip,
    # Ours keeps the first and the last step, evenly spaced and rounded.
    timestep_spacing='linspace',
  )
  precise(peer, process).set_timesteps(12)
  np.testing.assert_array_equal(
    peer.timesteps, process.respaced('12').kept[::-1]
  )
  # What a generator with this seed gives the scheduler, which draws nothing
  # in the last step.
  generator = torch.Generator().manual_seed(1)
  channels_first = (SHAPE[0], SHAPE[3], *SHAPE[1:3])
  draws = [
    torch.randn(channels_first, generator=generator).permute(0, 2, 3, 1)
    for _ in range(11)
  ]
  draws = np.stack([d.numpy() for d in draws] + [np.full(SHAPE, 7.0)])
  again = torch.Generator().manual_seed(1)
  second = variance == 'learned'
  want = walk(peer, x, second=second, keep=lambda i: {'generator': again})
  found = ours(
    samplers.ddpm,
    process,
    x,
    second=second,
    steps='12',
    noise=draws,
    restrict=diffusion.unit_range if clip else None,
  )
  assert_close(found, want)


@pytest.mark.parametrize('predicts', KINDS)
@pytest.mark.parametrize(
  ('eta', 'clip', 'schedule'),
  [
    (0.0, False, 'linear'),
    (0.6, True, 'linear'),
    (1.0, False, 'squaredcos_cap_v2'),
  ],
)
def test_ddim(diffusers, x, predicts, eta, clip, schedule):
  import torch

  process = diffusion.Gaussian(
    predicts=predicts, variance='small', schedule=SCHEDULES[schedule]
  )
  peer = diffusers.DDIMScheduler(
    beta_schedule=schedule,
    prediction_type=KINDS[predicts],
    clip_sample=clip,
    # The step before t is t - 1000 / 20 whatever the spacing: only the one
    # with a whole stride from step 0 on, our 'ddim20', is consistent with it.
    timestep_spacing='leading',
    set_alpha_to_one=True,
  )
  precise(peer, process).set_timesteps(20)
  np.testing.assert_array_equal(
    peer.timesteps, process.respaced('ddim20').kept[::-1]
  )
  rng = np.random.default_rng(1)
  draws = rng.standard_normal((20, *SHAPE)).astype(np.float32)

  def keep(i):
    z = torch.tensor(draws[i]).permute(0, 3, 1, 2)
    # Ours takes the noise from the clipped x0, as the official code does.
    return dict(eta=eta, variance_noise=z, use_clipped_model_output=True)

  found = ours(
    samplers.ddim,
    process,
    x,
    steps='ddim20',
    eta=eta,
    noise=draws,
    restrict=diffusion.unit_range if clip else None,
  )
  assert_close(found, walk(peer, x, keep=keep))


@pytest.mark.parametrize('predicts', KINDS)
@pytest.mark.parametrize('count', [8, 20])
def test_dpm_solver(diffusers, x, predicts, count):
  process = diffusion.Gaussian(predicts=predicts, variance='small')
  peer = diffusers.DPMSolverMultistepScheduler(
    prediction_type=KINDS[predicts],
    algorithm_type='dpmsolver++',
    solver_order=2,
    solver_type='midpoint',
    # Ours goes to sigma 0, where only a step of first order is finite.
    final_sigmas_type='zero',
  )
  # None of its spacings starts at the last and ends at the first step.
  kept = process.respaced(str(count)).kept[::-1]
  precise(peer, process).set_timesteps(timesteps=kept.tolist())
  np.testing.assert_array_equal(peer.timesteps, kept)
  found = ours(samplers.dpm_solver, process, x, steps=str(count))
  assert_close(found, walk(peer, x))


@pytest.mark.parametrize('count', [1, 10])
def test_flow_match_euler(diffusers, x, count):
  peer = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
  # Its own sigmas end at 1/1000 and then jump to 0; ours are evenly spaced
  # from 1 to 0, with one time more than there are steps.
  peer.set_timesteps(sigmas=np.linspace(1, 1 / count, count).tolist())

  # Its time and its velocity run from data to noise, ours the other way.
  def denoise(x, t):
    sigma = (1.0 - t)[:, None, None, None]
    return -network(jnp, x, 1000.0 * sigma)

  found = jax.jit(
    lambda x: solvers.ode(
      denoise,
      Interpolant(),
      x,
      solver=Fixed('euler'),
      num_steps=count + 1,
      path=True,
    )
  )(x)
  assert_close(np.asarray(found[1:]), walk(peer, x))
