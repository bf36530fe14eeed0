"""Draw samples from Gaussian diffusion: DDPM, DDIM, DPM-Solver++.

A sampler is one `lax.scan` over the kept steps, noisiest first, and may be
jitted. It calls `denoise(x, t)` with t int32 [B], steps of the whole process,
and reads the output through the process. Each sample has its own key, so what
comes out for it does not depend on the batch that it is drawn in.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfm_jax.ops.diffusion import Gaussian, Restrict
from vfm_jax.ops.keys import fold
from vfm_jax.ops.process import Prediction, bcast

Denoise = Callable[[jax.Array, jax.Array], jax.Array]
# (x, t) -> gradient by x of the log-probability of what is wanted.
Guide = Callable[[jax.Array, jax.Array], jax.Array]
Record = Callable[[jax.Array, Prediction], Any]


def initial_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Return normal noise f32 [B, *shape], the x_T of each key [B]."""
  return stream(keys, 0, shape)


def stream(
  keys: jax.Array | None, number: int | jax.Array, shape: tuple[int, ...]
) -> jax.Array:
  """Return normal noise f32 [B, *shape], stream `number` of each key [B].

  Stream 0 is x_T, and stream t + 1 what is added at step t.

  Raises:
    ValueError: there are no keys.
  """
  if keys is None:
    raise ValueError('expected `keys` [B] or recorded `noise`, found neither')

  draw = lambda key: jax.random.normal(key, shape, jnp.float32)  # noqa: E731
  return jax.vmap(draw)(fold(keys, number))


def ddpm(
  denoise: Denoise,
  process: Gaussian,
  x: jax.Array,
  keys: jax.Array | None = None,
  *,
  steps: str = '250',
  restrict: Restrict | None = None,
  guide: Guide | None = None,
  noise: jax.Array | None = None,
  record: Record | None = None,
) -> Any:
  """Sample by ancestral steps (DDPM, arXiv:2006.11239, algorithm 2).

  x <- mean + [t > 0] exp(logvar / 2) z.

  Args:
    denoise: the network, with its labels and guidance.
    process: that it was trained with.
    x: f32 [B, ..., C] noise, see `initial_noise`.
    keys: one key a sample [B]; None where nothing is drawn from them.
    steps: which steps to take, see `ops.noise.respacing`.
    restrict: what is done to each predicted x0, for example
      `ops.diffusion.unit_range`.
    guide: classifier guidance: adds variance times gradient to the mean
      (arXiv:2105.05233, algorithm 1).
    noise: [T, B, ..., C] what to add, in the order of sampling, in place of
      draws from the keys.
    record: (x after the step, prediction) -> what to keep of each step.

  Returns:
    x0 f32 [B, ..., C]; with `record`, the pair of it and what was kept, stacked
    in the order of sampling.
  """
  process = process.respaced(steps)

  def step(x, t, draw):
    p = _predict(denoise, process, x, t, restrict)
    mean, logvar = p.mean, p.logvar
    assert mean is not None
    assert logvar is not None
    if guide is not None:
      mean = mean + jnp.exp(logvar) * guide(x, process.original(t))
    return mean + bcast(t > 0, x) * jnp.exp(0.5 * logvar) * draw(), p

  return _walk(step, process, x, keys, noise, record)


def ddim(
  denoise: Denoise,
  process: Gaussian,
  x: jax.Array,
  keys: jax.Array | None = None,
  *,
  steps: str = '50',
  eta: float = 0.0,
  stride: int = 1,
  restrict: Restrict | None = None,
  guide: Guide | None = None,
  noise: jax.Array | None = None,
  record: Record | None = None,
) -> Any:
  """Sample by implicit steps (DDIM, arXiv:2010.02502, eqs. 12 and 16).

  x <- sqrt(abar') x0 + sqrt(1 - abar' - s^2) eps + [t > 0] s z, with abar' that
  of the step before and s = eta sqrt((1 - abar') / (1 - abar)
  (1 - abar / abar')): 0 is deterministic and 1 adds as much noise as DDPM with
  the small variance.

  Args:
    denoise: as in `ddpm`, and so the other arguments and the result.
    process: that it was trained with.
    x: f32 [B, ..., C] noise.
    keys: one key a sample [B]; None where nothing is drawn from them.
    steps: which steps to take.
    eta: how much noise a step adds.
    stride: walk over every stride-th step, though each undoes the noise of one:
      1, or 5 to repeat what the released code of DMP (arXiv:2405.17825) does.
    restrict: what is done to each predicted x0.
    guide: classifier guidance: moves eps by -sqrt(1 - abar) times the gradient
      (arXiv:2105.05233, algorithm 2); x0 follows, and is not restricted again.
    noise: what to add in place of draws.
    record: what to keep of each step.
  """
  process = process.respaced(steps)
  s = process.tables
  ratio = (1 - s.abar_prev) / (1 - s.abar) * (1 - s.abar / s.abar_prev)
  sigmas = eta * np.sqrt(ratio)
  # In exact arithmetic never negative; rounding makes it so at eta 1.
  rest = np.sqrt(np.maximum(1 - s.abar_prev - sigmas**2, 0.0))

  def step(x, t, draw):
    p = _predict(denoise, process, x, t, restrict)
    if guide is not None:
      shift = _at(np.sqrt(1 - s.abar), t, x) * guide(x, process.original(t))
      x0 = process.clean(p.eps - shift, x, t)
      p = p._replace(x0=x0, eps=process.noise_of(x0, x, t))
    mean = _at(np.sqrt(s.abar_prev), t, x) * p.x0 + _at(rest, t, x) * p.eps
    if not eta:
      return mean, p
    return mean + bcast(t > 0, x) * _at(sigmas, t, x) * draw(), p

  return _walk(step, process, x, keys, noise, record, stride=stride)


def ddim_reverse(
  denoise: Denoise,
  process: Gaussian,
  x: jax.Array,
  keys: jax.Array | None = None,
  *,
  steps: str = '50',
  restrict: Restrict | None = None,
  record: Record | None = None,
) -> Any:
  """Encode a clean x as noise: the steps of `ddim` at eta 0, cleanest first.

  Args:
    denoise: as in `ddpm`, and so the other arguments.
    process: that it was trained with.
    x: f32 [B, ..., C] clean samples.
    keys: not used: nothing is drawn.
    steps: which steps to take.
    restrict: what is done to each predicted x0.
    record: what to keep of each step.
  """
  del keys
  process = process.respaced(steps)
  following = process.tables.abar_next

  def step(x, t, draw):
    del draw
    p = _predict(denoise, process, x, t, restrict)
    signal, sigma = np.sqrt(following), np.sqrt(1 - following)
    return _at(signal, t, x) * p.x0 + _at(sigma, t, x) * p.eps, p

  return _walk(step, process, x, None, None, record, ascending=True)


def dpm_solver(
  denoise: Denoise,
  process: Gaussian,
  x: jax.Array,
  keys: jax.Array | None = None,
  *,
  steps: str = '20',
  restrict: Restrict | None = None,
  record: Record | None = None,
) -> Any:
  """Sample with DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2).

  With alpha = sqrt(abar), sigma = sqrt(1 - abar), lambda = log(alpha / sigma)
  and h the growth of lambda in a step, x <- sigma' / sigma x
  - alpha' (exp(-h) - 1) D, where D extrapolates the last two predictions of x0
  by half a step. The first step, and the last one to sigma' = 0, take D = x0.

  Args:
    denoise: as in `ddpm`, and so the other arguments.
    process: that it was trained with.
    x: f32 [B, ..., C] noise.
    keys: not used: nothing is drawn.
    steps: which steps to take.
    restrict: what is done to each predicted x0.
    record: what to keep of each step.
  """
  del keys
  process = process.respaced(steps)
  keep, gain, lead = _solver_tables(process)

  def step(carry, t, draw):
    del draw
    x, before = carry
    p = _predict(denoise, process, x, t, restrict)
    ahead = p.x0 + _at(lead, t, x) * (p.x0 - before)
    x = _at(keep, t, x) * x + _at(gain, t, x) * ahead
    return (x, p.x0), p

  kept = None if record is None else (lambda carry, p: record(carry[0], p))
  out = _walk(step, process, (x, jnp.zeros_like(x)), None, None, kept)
  return out[0] if record is None else (out[0][0], out[1])


def _walk(
  step, process, carry, keys, noise, record, *, ascending=False, stride=1
):
  """Scan `step(carry, t, draw) -> (carry, prediction)` over the kept steps.

  Args:
    step: what one step does; `draw()` is its normal noise.
    process: already respaced.
    carry: x, or a tuple that starts with it.
    keys: one key a sample, or None where nothing is drawn.
    noise: recorded noise by position, or None.
    record: what to keep, or None.
    ascending: from the cleanest step on.
    stride: of the steps to take.
  """
  order = np.arange(process.num_kept)[:: 1 if ascending else -stride]
  if noise is not None and len(noise) != len(order):
    raise ValueError(
      f'expected `noise` for each of the {len(order)} steps, found {len(noise)}'
    )
  x = jax.tree.leaves(carry)[0]

  def body(carry, inputs):
    j, recorded = inputs
    t = jnp.full(x.shape[:1], j, jnp.int32)

    def draw():
      if recorded is not None:
        return recorded
      if keys is None:
        raise ValueError('expected `keys`, one a sample, found None')
      return stream(keys, j + 1, x.shape[1:])

    carry, p = step(carry, t, draw)
    return carry, None if record is None else record(carry, p)

  inputs = (jnp.asarray(order, jnp.int32), noise)
  carry, kept = jax.lax.scan(body, carry, inputs)
  return carry if record is None else (carry, kept)


def _predict(denoise, process, x, t, restrict) -> Prediction:
  output = denoise(x, process.original(t))
  return process.predict(output, x, t, restrict=restrict)


def _at(table: np.ndarray, t: jax.Array, x: jax.Array) -> jax.Array:
  return bcast(jnp.asarray(table, jnp.float32)[t], x)


def _solver_tables(process: Gaussian) -> tuple[np.ndarray, ...]:
  """Return the factors of x, of D and of the last difference, by step."""
  s = process.tables
  lambdas = 0.5 * np.log(s.abar / (1 - s.abar))
  ahead = lambdas[:-1] - lambdas[1:]  # h of steps 1 .. T-1
  growth = np.append(np.inf, ahead)
  keep = np.sqrt((1 - s.abar_prev) / (1 - s.abar))
  gain = -np.sqrt(s.abar_prev) * np.expm1(-growth)
  lead = np.zeros_like(s.abar)
  # Half of h over the h of the step before, which is one number higher.
  lead[1:-1] = 0.5 * ahead[:-1] / ahead[1:]
  return keep, gain, lead
