"""Run the recorded cases of Gaussian diffusion.

Each runner takes the sidecar and the arrays of a case and returns what this
library computes for every array to check, driven by the sidecar.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import released
from released import first, last

from vfm_jax import convert_dit, guidance, samplers
from vfm_jax.evals import bits
from vfm_jax.models.dit import DiT
from vfm_jax.ops import noise
from vfm_jax.ops.diffusion import Gaussian, unit_range
from vfm_jax.ops.process import bcast
from vfm_jax.ops.timesteps import LossAware

SCHEDULES = {'linear': noise.linear, 'squaredcos_cap_v2': noise.cosine}
RAW = {
  'linear': noise.raw_linear,
  'quad': noise.quadratic,
  'warmup10': functools.partial(noise.warmup, share=0.1),
  'warmup50': functools.partial(noise.warmup, share=0.5),
  'const': lambda steps, start, end: noise.constant(steps, end=end),
  'jsd': lambda steps, start, end: noise.harmonic(steps),
}


def toy(params, x, t, *, learned=True):
  """Return the output of the sidecars' toy model; t is an original step."""
  a, t = params, t.astype(jnp.float32).reshape(-1, 1, 1, 1)
  mean = a[0] * x + a[1] * jnp.sin(a[2] * x + t / 200)
  if not learned:
    return mean
  return jnp.concatenate([mean, jnp.tanh(a[3] * x - t / 1000)], -1)


def run_b_schedules(meta: dict, arrays: dict) -> dict:
  cfg, out = meta['config'], {}
  for name in cfg['named']:
    for spec in cfg['respacings']:
      process = Gaussian(cfg['T'], SCHEDULES[name], respacing=spec)
      s, prefix = process.tables, f'out/{name}/{_folder(spec)}'
      out |= {
        f'{prefix}/{key}': value
        for key, value in {
          'betas': s.beta,
          'alphas_cumprod': s.abar,
          'alphas_cumprod_prev': s.abar_prev,
          'alphas_cumprod_next': s.abar_next,
          'sqrt_alphas_cumprod': np.sqrt(s.abar),
          'sqrt_one_minus_alphas_cumprod': np.sqrt(1 - s.abar),
          'log_one_minus_alphas_cumprod': np.log(1 - s.abar),
          'sqrt_recip_alphas_cumprod': np.sqrt(1 / s.abar),
          'sqrt_recipm1_alphas_cumprod': np.sqrt(1 / s.abar - 1),
          'posterior_variance': s.post_var,
          'posterior_log_variance_clipped': s.post_logvar,
          'posterior_mean_coef1': s.post_x0,
          'posterior_mean_coef2': s.post_xt,
          'timestep_map': process.kept,
        }.items()
      }
    out[f'out/named_T2/{name}'] = SCHEDULES[name](cfg['T2'])
  for name in arrays:
    if name.startswith('out/raw_beta/'):
      make = RAW[name.rsplit('/', 1)[-1]]
      out[name] = make(len(arrays[name]), start=2e-4, end=0.03)
    elif name.startswith('out/use_timesteps/'):
      spec = name.rsplit('/', 1)[-1]
      if spec == 'list_300':
        out[name] = noise.respacing(300, '10,15,20')
      else:
        out[name] = noise.respacing(cfg['T'], spec.replace('_', ','))
  return out


def _folder(spec: str) -> str:
  return spec.replace(',', '_') or 'full'


def _spec(folder: str) -> str:
  return '' if folder == 'full' else folder.replace('_', ',')


def run_b_losses(meta: dict, arrays: dict) -> dict:
  cfg = meta['config']
  x0, eps = last(arrays['in/x0']), last(arrays['in/noise'])

  @jax.jit
  def compute(params):
    out = _toy_losses(arrays, x0, eps, params)
    out |= _options(cfg['opt_*'], arrays, x0, eps)
    return out | _bits(arrays, x0, params)

  out = compute(jnp.asarray(arrays['in/toy_params']))
  return out | _dit_losses(cfg, arrays, x0)


def _toy_losses(arrays, x0, eps, params):
  out = {}
  for name in arrays:
    if name.startswith('in/') and name.endswith('/t'):
      schedule, folder = name.split('/')[1:3]
      process = Gaussian(schedule=SCHEDULES[schedule], respacing=_spec(folder))
      prefix = f'{schedule}/{folder}'
      t = jnp.asarray(arrays[name])
      model = functools.partial(toy, params)
      loss, parts, x_t = _loss(process, model, x0, eps, t)
      out[f'out/{prefix}/x_t'] = first(x_t)
      out |= {f'out/{prefix}/toy/{k}': v for k, v in parts.items()}
      out[f'out/{prefix}/toy/loss'] = loss
      t_grad = jnp.asarray(arrays[f'in/{prefix}/t_grad'])
      out[f'grad/{prefix}/toy_params'] = jax.grad(
        lambda p, process=process, t=t_grad: _loss(
          process, functools.partial(toy, p), x0, eps, t
        )[0].mean()
      )(params)
      if f'out/{prefix}/post_mean' in arrays:
        out |= _views(process, model, x0, x_t, t, f'out/{prefix}')
  return out


def _dit(cfg, arrays):
  """Return the tiny DiT of a case and its parameters."""
  sizes = cfg['dit']
  model = DiT(
    width=cfg['hidden'],
    depth=sizes['depth'],
    heads=sizes.get('num_heads', cfg['heads']),
    patch=sizes['patch_size'],
    input_size=sizes['input_size'],
    channels=sizes['in_channels'],
    num_classes=cfg['classes'],
    scan=True,
  )
  return model, released.dit_params(model, arrays, 'w/dit.')


def _dit_losses(cfg, arrays, x0):
  model, params = _dit(cfg, arrays)
  eps, y = last(arrays['in/noise_dit']), jnp.asarray(arrays['in/y'])

  @jax.jit
  def forward(params, x_t, time):
    return model.apply({'params': params}, x_t, time, y)

  @jax.jit
  def backward(params, x_t, time, cotangent):
    return jax.vjp(lambda p: forward(p, x_t, time), params)[1](cotangent)[0]

  @functools.partial(jax.jit, static_argnums=0)
  def start(process, t):
    return process.corrupt(x0, eps, t), process.model_time(t)

  @functools.partial(jax.jit, static_argnums=0)
  def graded(process, output, x_t, t):
    def score(output):
      total, parts = process.loss(output, x0, eps, x_t, t)
      return total.mean(), {**parts, 'loss': total}

    return jax.value_and_grad(score, has_aux=True)(output)

  out = {}
  for name in arrays:
    if not name.endswith('/dit/loss'):
      continue
    schedule, folder = name.split('/')[1:3]
    process = Gaussian(schedule=SCHEDULES[schedule], respacing=_spec(folder))

    def run(t, process=process):
      x_t, time = start(process, t)
      output = forward(params, x_t, time)
      (_, parts), cotangent = graded(process, output, x_t, t)
      return parts, (params, x_t, time, cotangent)

    prefix = f'{schedule}/{folder}'
    parts, _ = run(arrays[f'in/{prefix}/t'])
    out |= {f'out/{prefix}/dit/{k}': v for k, v in parts.items()}
    grads = backward(*run(arrays[f'in/{prefix}/t_grad'])[1])
    grads = convert_dit.to_dit(jax.device_get(grads), model)
    out |= {f'grad/{prefix}/dit.{k}': v for k, v in grads.items()}
  return out


def _loss(process, model, x0, eps, t):
  """Return the loss, its parts and x_t."""
  x_t = process.corrupt(x0, eps, t)
  output = model(x_t, process.model_time(t))
  return *process.loss(output, x0, eps, x_t, t), x_t


def _views(process, model, x0, x_t, t, prefix):
  """Return the posterior, the marginal and what the toy model predicts."""
  flat = lambda x: x.reshape(-1)  # noqa: E731
  mean, var, logvar = process.posterior(x0, x_t, t)
  out = {'post_mean': first(mean), 'post_var': flat(var)}
  out['post_logvar'] = flat(logvar)
  mean, var, logvar = process.marginal(x0, t)
  out |= {'q_mean': first(mean), 'q_var': flat(var), 'q_logvar': flat(logvar)}
  output = model(x_t, process.model_time(t))
  for clip, restrict in enumerate((None, unit_range)):
    p = process.predict(output, x_t, t, restrict=restrict)
    out |= {
      f'pmv_clip{clip}/mean': first(p.mean),
      f'pmv_clip{clip}/variance': first(jnp.exp(p.logvar)),
      f'pmv_clip{clip}/log_variance': first(p.logvar),
      f'pmv_clip{clip}/pred_xstart': first(p.x0),
      f'vb_bpd_clip{clip}': process.bound(
        output, x0, x_t, t, restrict=restrict
      ),
    }
  out['prior_bpd'] = process.prior_bound(x0)
  return {f'{prefix}/{k}': v for k, v in out.items()}


def _option(config: dict) -> Gaussian:
  """Return the process of official option names."""
  learned = config.get('learn_sigma', True)
  fixed = 'small' if config.get('sigma_small') else 'large'
  criterion = 'mse'
  if config.get('use_kl'):
    criterion = 'rescaled_kl'
  elif config.get('rescale_learned_sigmas'):
    criterion = 'rescaled_mse'
  return Gaussian(
    predicts='x0' if config.get('predict_xstart') else 'eps',
    variance='learned' if learned else fixed,
    criterion=criterion,
  )


def _options(options, arrays, x0, eps):
  out = {}
  names = {tuple(k.split('/')[1:3]) for k in arrays if k.startswith('out/opt_')}
  for option, folder in names:
    config = options[option.removeprefix('opt_')]
    process = _option(config).respaced(_spec(folder))
    key = 'toy_params_xstart' if process.predicts == 'x0' else 'toy_params'
    model = functools.partial(
      toy,
      jnp.asarray(arrays[f'in/{key}']),
      learned=process.variance == 'learned',
    )
    t = jnp.asarray(arrays[f'in/linear/{folder}/t'])
    loss, parts, x_t = _loss(process, model, x0, eps, t)
    p = process.predict(model(x_t, process.model_time(t)), x_t, t)
    out |= {
      f'out/{option}/{folder}/{k}': v
      for k, v in {
        **parts,
        'loss': loss,
        'log_variance_rowmean': _rows(p.logvar, x0),
        'pred_xstart_rowmean': _rows(p.x0, x0),
      }.items()
    }
  return out


def _rows(x, like):
  """Return the mean of each example [B]."""
  return jnp.broadcast_to(x, like.shape).mean((1, 2, 3))


def _bits(arrays, x0, params):
  """Return the variational bound, step by step from the noisiest."""
  noises, out = last(arrays['in/bpd_noise']), {}
  process = Gaussian(respacing=str(len(noises)))
  for clip, restrict in enumerate((None, unit_range)):
    got = bits.bits_per_dim(
      functools.partial(toy, params),
      process,
      x0,
      steps=process.respacing,
      noise=noises,
      restrict=restrict,
    )
    out |= {
      f'out/bpd_clip{clip}/total_bpd': got.total,
      f'out/bpd_clip{clip}/prior_bpd': got.prior,
      f'out/bpd_clip{clip}/vb': got.bound,
      f'out/bpd_clip{clip}/xstart_mse': got.x0_mse,
      f'out/bpd_clip{clip}/mse': got.eps_mse,
    }
  return out


def run_b_sampling(meta: dict, arrays: dict) -> dict:
  cfg, out = meta['config'], {}
  params = jnp.asarray(arrays['in/toy_params'])
  model, weights = _dit(cfg, arrays)
  for schedule, spec in cfg['loop']:
    prefix = f'{schedule}/{_folder(spec)}'
    process = Gaussian(schedule=SCHEDULES[schedule])
    out[f'out/{prefix}/timestep_map'] = process.respaced(spec).kept

    @jax.jit
    def compute(params, weights, process=process, spec=spec, prefix=prefix):
      given = arrays, process, spec, prefix
      return {
        **_toy_samples(params, *given),
        **_dit_samples(cfg, model, weights, *given),
      }

    out |= compute(params, weights)
  return out


def _toy_samples(params, arrays, process, spec, prefix):
  out = {}
  z, draws = (last(arrays[f'in/{prefix}/{k}']) for k in ('z', 'noise'))
  model = functools.partial(toy, params)
  for name in arrays:
    head, _, kind = name.rpartition('/')
    if head.startswith(f'out/{prefix}/toy/') and kind == 'samples':
      samples, x0 = _sample(
        head.rsplit('/', 1)[-1], model, process, spec, z, draws
      )
      out[f'{head}/samples'] = first(samples)
      out[f'{head}/pred_xstart'] = first(x0)
  return out


def _dit_samples(cfg, model, params, arrays, process, spec, prefix):
  """Sample from the tiny DiT, with labels and with guidance."""
  y = jnp.asarray(arrays[f'in/{prefix}/cfg_y'])
  z, draws = (last(arrays[f'in/{prefix}/{k}']) for k in ('z', 'noise'))
  half = len(z)

  def denoise(x, t, y):
    return model.apply({'params': params}, x, t.astype(jnp.float32), y)

  guided = guidance.cfg(
    denoise, y[:half], cfg['cfg'], model.null_label, channels=3
  )

  def official(x, t):
    # The second half of x is not looked at; its output is the null label's
    # outside the guided channels.
    x, t = x[:half], t[:half]
    kept, null = guided(x, t), denoise(x, t, y[half:])
    other = jnp.concatenate([kept[..., :3], null[..., 3:]], -1)
    return jnp.concatenate([kept, other])

  def path(denoise, x, noise, clip):
    return samplers.ddpm(
      denoise,
      process,
      x,
      None,
      steps=spec,
      restrict=clip,
      noise=noise,
      record=lambda x, p: (x, p.x0),
    )[1]

  labelled = lambda x, t: denoise(x, t, y[:half])  # noqa: E731
  plain, _ = path(labelled, z, draws, unit_range)
  noises = last(arrays[f'in/{prefix}/cfg_noise'])
  both, x0 = path(official, jnp.concatenate([z, z]), noises, None)
  return {
    f'out/{prefix}/dit/p_clip1/samples': first(plain),
    f'out/{prefix}/dit_cfg/p_clip0/samples': first(both),
    f'out/{prefix}/dit_cfg/p_clip0/pred_xstart_last': first(x0[-1]),
  }


def _guide(x, t):
  """Return the gradient of the sidecar's classifier."""
  return -0.3 * x + 1e-4 * bcast(t, x)


def _sample(name, model, process, spec, z, draws):
  """Return x and x0 after each step of the loop that a case's name says."""
  both = lambda x, p: (x, p.x0)  # noqa: E731
  clip = unit_range if 'clip1' in name or 'condfn' in name else None
  shared = dict(steps=spec, record=both, restrict=clip)
  if name == 'ddim_reverse':
    x = jnp.clip(0.5 * z, -1, 1)
    return samplers.ddim_reverse(model, process, x, **shared)[1]
  shared |= dict(noise=draws, guide=_guide if 'condfn' in name else None)
  if name.startswith('p_'):
    return samplers.ddpm(model, process, z, None, **shared)[1]
  eta = float(name.split('eta')[1]) if 'eta' in name else 0.0
  return samplers.ddim(model, process, z, None, eta=eta, **shared)[1]


def run_b_timestep_sampler(meta: dict, arrays: dict) -> dict:
  cfg = meta['config']
  times = LossAware(cfg['T'], cfg['history_per_term'], cfg['uniform_prob'])
  with jax.enable_x64(True):
    history = times.init()

    def relative(history):
      # The official numbers before normalising: ones without a history.
      p = times.probabilities(history)
      return p if history.counts.min() == times.keep else p * times.steps

    weights = [relative(history)]
    for t, losses in zip(arrays['in/ts'], arrays['in/losses'], strict=True):
      history = times.update(history, jnp.asarray(t), jnp.asarray(losses))
      weights.append(relative(history))
    p = times.probabilities(history)
    return {
      'out/weights': np.stack(weights),
      'out/history': np.asarray(history.losses),
      'out/importance': np.asarray(times.importance(p, arrays['in/indices'])),
    }
