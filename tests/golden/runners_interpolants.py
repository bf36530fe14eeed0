"""Run the recorded cases of interpolants (SiT).

Each runner takes the sidecar and the arrays of a case and returns what this
library computes for every array to check, driven by the sidecar.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import released
from released import first, last

from vfm_jax import convert_dit, guidance, solvers
from vfm_jax.models.dit import DiT
from vfm_jax.ops import paths
from vfm_jax.ops.dopri5 import Dopri5
from vfm_jax.ops.interpolants import Interpolant, interval
from vfm_jax.ops.process import bcast
from vfm_jax.ops.runge_kutta import Fixed

PATHS = {'Linear': paths.Linear(), 'GVP': paths.GVP(), 'VP': paths.VP()}
FORMS = {
  'constant': 'constant',
  'SBDM': 'sbdm',
  'sigma': 'sigma',
  'linear': 'linear',
  'decreasing': 'decreasing',
  # As the official code spells it.
  'inccreasing-decreasing': 'increasing_decreasing',
}
METHODS = {
  'euler': 'euler',
  'midpoint': 'midpoint',
  'heun2': 'heun',
  'heun3': 'heun3',
  'rk4': 'rk4',
}


def toy(params, x, t):
  """Return the output of the sidecars' toy model."""
  a = params
  return a[0] * x + a[1] * jnp.sin(a[2] * x + bcast(3 * t, x))


def run_c_sit_paths(meta: dict, arrays: dict) -> dict:
  t, grid = (jnp.asarray(arrays[f'in/{k}']) for k in ('t', 't_grid'))
  keys = ('x1', 'x0', 'velocity', 'score')
  data, noise, v, score = (jnp.asarray(arrays[f'in/{k}']) for k in keys)
  out = {}
  for name, path in PATHS.items():
    process = Interpolant(path)
    x_t = process.corrupt(data, noise, t)
    found = {
      'alpha': path.alpha(grid),
      'd_alpha': path.d_alpha(grid),
      'sigma': path.sigma(grid),
      'd_sigma': path.d_sigma(grid),
      'd_alpha_over_alpha': path.log_slope(grid),
      'xt': x_t,
      'ut': process.target(data, noise, t),
      'drift_mean': -bcast(path.log_slope(t), x_t) * x_t,
      'drift_var': path.score_weight(t),
      'score_from_velocity': paths.score_from_velocity(path, v, x_t, t),
      'noise_from_velocity': paths.noise_from_velocity(path, v, x_t, t),
      'velocity_from_score': paths.velocity_from_score(path, score, x_t, t),
    }
    out |= {f'out/{name}/{key}': value for key, value in found.items()}
  for key in arrays:
    if '/diffusion/' in key:
      name, _, form, norm = key.split('/')[1:]
      path = PATHS[name]
      out[key] = paths.diffusion(path, t, FORMS[form], float(norm))
  doc = meta['arrays']['in/interval_cases']['doc']
  given = [float(x) for x in re.findall(r'_eps=([\d.e-]+)', doc)]
  ((*sizes,),) = re.findall(r'last_step_size \(0: ([\d.]+), 1: ([\d.]+)', doc)
  sizes = [float(x) for x in sizes]
  rows = [_interval(given, sizes, *row) for row in arrays['in/interval_cases']]
  out['out/intervals'] = np.array(rows, np.float64)
  return out


def _interval(
  given, sizes, path, prediction, with_eps, sde, ev, reverse, form, step
):
  """Return what the official code gives: train_eps, sample_eps, t0, t1.

  It ignores given margins where a velocity is finite, which is an error here,
  and turns the interval around by t -> 1 - t.
  """
  name = ('Linear', 'GVP', 'VP')[path]
  prediction = ('velocity', 'score', 'noise')[prediction]
  ignored = prediction == 'velocity' and name != 'VP'
  train, sample = given if with_eps and not ignored else (None, None)
  process = Interpolant(
    PATHS[name], prediction, train_eps=train, sample_eps=sample
  )
  margins = process.margins()
  t0, t1 = interval(
    process.path,
    prediction,
    margins[int(ev)],
    sde=bool(sde),
    form=('sbdm', 'sigma')[form],
    last_step_size=sizes[step],
  )
  return *margins, *((1 - t0, 1 - t1) if reverse else (t0, t1))


def run_c_sit_losses(meta: dict, arrays: dict) -> dict:
  cfg, params = meta['config'], jnp.asarray(arrays['in/toy_params'])
  data, noise = last(arrays['in/x1']), last(arrays['in/x0'])
  t, out = jnp.asarray(arrays['in/t']), {}

  @jax.jit
  def compute(params):
    found = {}
    for key in arrays:
      if not key.startswith('out/loss/'):
        continue
      name, prediction, weight = key.split('/')[2:]
      process = Interpolant(PATHS[name], prediction, weight)

      def mean(params, process=process):
        model = functools.partial(toy, params)
        losses = _losses(process, data, noise, t, model)
        return losses.mean(), losses

      grad, found[key] = jax.grad(mean, has_aux=True)(params)
      found[key.replace('out/', 'grad/')] = grad
    return found

  for key in arrays:
    parts = key.split('/')[1:]
    if key.startswith('out/sampled_t/'):
      draws = jnp.asarray(arrays['in/u'])
      process = Interpolant(
        PATHS[parts[1]], parts[2], density=lambda _, draws=draws: draws
      )
      out[key] = process.draw_time(None)
  return out | compute(params) | _network_losses(cfg, arrays)


def _losses(process, data, noise, t, model):
  x_t = process.corrupt(data, noise, t)
  output = model(x_t, process.model_time(t))
  return process.loss(output, data, noise, x_t, t)[0]


def _network(cfg, arrays):
  """Return the tiny SiT of a case, and its parameters."""
  sit = cfg['sit']
  model = DiT(
    width=cfg['hidden'],
    depth=sit.get('depth', cfg['depth']),
    heads=cfg['heads'],
    patch=sit['patch_size'],
    input_size=sit['input_size'],
    channels=sit['in_channels'],
    learn_sigma=sit.get('learn_sigma', True),
    num_classes=cfg['classes'],
  )
  return model, released.dit_params(model, arrays)


def _guided(model, forward, y, scale):
  """Return the official guidance: of half of the rows, for both halves.

  Channels that it does not guide keep the conditional output in the first half
  and the unconditional one in the second, which starts from the first's x but
  has times of its own.
  """
  channels, half = 3, len(y) // 2
  assert (y[half:] == model.null_label).all()
  y = jnp.asarray(y)

  def denoise(x, t):
    x = x[:half]
    output = forward(jnp.concatenate([x, x]), t, y)
    upper = guidance.cfg(
      lambda x, t, y: output,
      y[:half],
      scale,
      model.null_label,
      channels=channels,
    )(x, t[:half])
    null = output[half:]
    lower = jnp.concatenate([upper[..., :channels], null[..., channels:]], -1)
    return jnp.concatenate([upper, lower])

  return denoise


def _network_losses(cfg, arrays):
  model, params = _network(cfg, arrays)
  data, noise = last(arrays['in/x1']), last(arrays['in/x0'])
  t, y = jnp.asarray(arrays['in/t']), jnp.asarray(arrays['in/y'])
  drop = jnp.asarray(arrays['in/drop_uniform'] < model.label_dropout)
  keep = jnp.zeros_like(drop)

  @jax.jit
  def forward(params, x, t, y, drop):
    return model.apply({'params': params}, x, t, y, drop=drop)

  @jax.jit
  def pull(params, x, t, y, drop, cotangent):
    _, back = jax.vjp(lambda p: forward(p, x, t, y, drop), params)
    return back(cotangent)[0]

  @functools.partial(jax.jit, static_argnums=0)
  def start(process):
    return process.corrupt(data, noise, t)

  @functools.partial(jax.jit, static_argnums=0)
  def graded(process, output, x_t):
    def mean(output):
      losses = process.loss(output, data, noise, x_t, t)[0]
      return losses.mean(), losses

    return jax.grad(mean, has_aux=True)(output)

  channels, half = model.channels, len(y) // 2
  x = 0.5 * (data + noise)
  denoise = _guided(
    model,
    lambda x, t, y: forward(params, x, t, y, keep),
    np.append(y[:half], [model.null_label] * half),
    cfg['cfg'],
  )
  twice = jnp.concatenate([x[:half]] * 2)
  out = {
    'out/sit/eval': first(forward(params, x, t, y, keep)[..., :channels]),
    'out/sit/cfg': first(denoise(twice, t)[..., :channels]),
  }
  for key in arrays:
    if key.startswith('out/sit/') and key.endswith('/loss'):
      case = key.split('/')[2]
      name, *options = case.split('_')
      process = Interpolant(PATHS[name], *options)
      x_t = start(process)
      output = forward(params, x_t, t, y, drop)
      cotangent, out[key] = graded(process, output, x_t)
      gradient = pull(params, x_t, t, y, drop, cotangent)
      gradient = convert_dit.to_dit(gradient, model)
      prefix = f'grad/sit/{case}/'
      out |= {
        name: gradient[name.removeprefix(prefix)]
        for name in arrays
        if name.startswith(prefix)
      }
  return out


def run_c_sit_sampling(meta: dict, arrays: dict) -> dict:
  cfg, params = meta['config'], jnp.asarray(arrays['in/toy_params'])
  draws = last(arrays['in/sde_noise'])
  signs = 2 * last(arrays['in/hutchinson_bits']) - 1

  def ode(name, prediction, interval, method, z, rtol=1e-3):
    return solvers.ode(
      _field(params, name, prediction),
      Interpolant(PATHS[name], prediction),
      z,
      solver=_solver(method, rtol),
      num_steps=cfg['ode_num_steps'],
      interval=interval,
      path=True,
    )

  def sde(name, prediction, form, last_step, method, z):
    return solvers.sde(
      _field(params, name, prediction),
      Interpolant(PATHS[name], prediction),
      z,
      keys=None,
      method=method.lower(),
      num_steps=cfg['sde_num_steps'],
      form=FORMS[form],
      norm=cfg['norm'],
      last_step=last_step.lower(),
      last_step_size=cfg['last_step_size'],
      noise=draws,
      path=True,
    )

  # What cases have in common is solved once; adaptive steps are compiled once
  # for all tolerances, and the rest is one program.
  fixed, adaptive = {}, {}
  for key in arrays:
    if key.startswith('out/ode/'):
      *call, rtol = _ode_call(*key.split('/')[2:])
      if call[-1] == 'dopri5':
        adaptive[key] = call, float(rtol or 1e-3)
      else:
        fixed.setdefault(tuple(call), []).append(key)

  @jax.jit
  def compute(z):
    states = {keys[0]: ode(*call, z) for call, keys in fixed.items()}
    for key in arrays:
      if key.startswith('out/sde/'):
        states[key] = sde(*key.split('/')[2:], z)
    found = solvers.log_likelihood(
      functools.partial(toy, params),
      Interpolant(),
      z,
      None,
      solver=Fixed('euler'),
      num_steps=cfg['ode_num_steps'],
      probe=lambda keys, i, shape: signs[i],
    )
    return states | {'out/likelihood/z': found.z}, found.logp

  z = last(arrays['in/z'])
  states, logp = compute(z)
  for keys in fixed.values():
    states |= dict.fromkeys(keys, states[keys[0]])
  solve = jax.jit(ode, static_argnums=range(4))
  for key, (call, rtol) in adaptive.items():
    states[key] = solve(*call, z, rtol)
  out = {key: first(value) for key, value in states.items()}
  return out | {'out/likelihood/logp': logp} | _network_samples(cfg, arrays)


def _ode_call(name, prediction, method):
  """Return path, prediction, interval, solver and tolerance ('' for none)."""
  t0, t1 = Interpolant(PATHS[name], prediction).sample_interval()
  if method.endswith('_reverse'):
    t0, t1 = 1 - t0, 1 - t1
  # Where the toy is the velocity, only the interval tells paths apart.
  name = 'Linear' if prediction == 'velocity' else name
  method, _, rtol = method.removesuffix('_reverse').partition('_rtol')
  return name, prediction, (t0, t1), method, rtol


def _network_samples(cfg, arrays):
  model, params = _network(cfg, arrays)
  denoise = _guided(
    model,
    lambda x, t, y: model.apply({'params': params}, x, t, y),
    arrays['in/sit/y'],
    cfg['cfg'],
  )
  z, out = last(arrays['in/sit/z']), {}
  points = len(arrays['out/sit/ode_euler'])
  for key in arrays:
    if key.startswith('out/sit/ode_'):
      method = key.removeprefix('out/sit/ode_')
      run = functools.partial(
        solvers.ode,
        denoise,
        Interpolant(),
        solver=_solver(method),
        num_steps=points,
        path=len(arrays[key].shape) > z.ndim,
      )
      out[key] = first(jax.jit(run)(z))
  return out


def _solver(name, rtol=1e-3):
  """Return the solver of a name of torchdiffeq."""
  if name == 'dopri5':
    return Dopri5(rtol=rtol, norm='batch')
  return Fixed(METHODS[name])


def _field(params, name, prediction):
  """Return the toy model; of scores and noises, the sidecar's own one."""
  if prediction == 'velocity':
    return functools.partial(toy, params)
  path, a = PATHS[name], params
  offset = 0.3 if name == 'VP' else 0.0

  def field(x, t):
    alpha, sigma = bcast(path.alpha(t), x), bcast(path.sigma(t), x)
    spread = 0.36 * jnp.square(alpha) + jnp.square(sigma)
    wave = a[1] * bcast(t + offset, x) * jnp.sin(a[2] * x)
    score = -x / spread + wave
    return score if prediction == 'score' else -sigma * score

  return field
