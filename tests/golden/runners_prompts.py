"""Run the recorded cases of DMP, a DiT patched with prompts.

Each runner takes the sidecar and the arrays of a case and returns what this
library computes for every array to check, driven by the sidecar.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import released
from released import first, last

from vfm_jax import convert_dmp, guidance, samplers
from vfm_jax.models import prompts
from vfm_jax.nn import adaln, transformer
from vfm_jax.objectives.balance import Balance
from vfm_jax.ops import gating, noise
from vfm_jax.ops.diffusion import Gaussian, unit_range


def run_g_dmp(meta: dict, arrays: dict) -> dict:
  cfg = meta['config']
  model = patched(cfg)
  params = parameters(model, arrays)
  x, t, y = last(arrays['in/x']), arrays['in/t'], arrays['in/y']
  run = jax.jit(functools.partial(apply, model, params))
  out, seen, gates = run(x, t, y)
  plain = scanned(model.clone(hooks=adaln.Hooks()))
  return {
    'out/eval': first(out),
    **{f'out/eval_{k}': v for k, v in gates.items()},
    **{
      f'out/inter/block{i}': seen[f'blocks_{i}']['__call__'][0]
      for i in range(cfg['depth'])
    },
    'out/original_forward': first(jax.jit(plain)(params, x, t, y)[0]),
    'out/cfg': guided(lambda *args: run(*args)[0], model, meta, arrays),
    **alone(model, params, cfg, arrays),
    **trained(model, params, cfg, arrays),
  }


def run_g_dmp_misc(meta: dict, arrays: dict) -> dict:
  cfg = meta['config']
  model = patched(cfg)
  params = parameters(model, arrays)
  x, t, y = last(arrays['in/x']), arrays['in/t'], arrays['in/y']
  clean, noisy, std = (
    arrays[f'in/topk_{k}'] for k in ('clean', 'noisy', 'std')
  )
  spec = re.search(
    r'respacing (\S+):', meta['arrays']['out/ddim_model_timesteps']['doc']
  )
  process = Gaussian()

  def toy(x, t):
    del t
    return jnp.concatenate([0.9 * x + 0.1 * jnp.sin(2 * x), jnp.tanh(x)], -1)

  kept = process.respaced(spec[1]).kept
  _, samples = samplers.ddim(
    toy,
    process,
    last(arrays['in/ddim_z']),
    steps=spec[1],
    stride=5,
    restrict=unit_range,
    record=lambda x, p: x,
  )
  return {
    'out/pt_eval': first(jax.jit(scanned(model))(params, x, t, y)[0]),
    'out/ddim_samples': first(samples),
    'out/ddim_model_timesteps': kept[::-5],
    **{
      name: gating.chance(clean, noisy, std, int(name.rsplit('/k')[1]))
      for name in arrays
      if name.startswith('out/prob_in_top_k/')
    },
  }


def patched(cfg):
  hooks = prompts.dmp(
    cfg['num_tokens'],
    mode=cfg['vp_type'],
    kind='PT' if cfg['gate_type'] == 'PT' else 'DMP',
    top=cfg['topk'],
    depth=cfg['pt_depth'],
  )
  fields = {}
  if cfg['uncond']:
    dropout = cfg.get('class_dropout_prob', 0.0)
    fields = dict(num_classes=1, label_dropout=dropout)
  return released.dit(cfg, hooks, **fields)


def parameters(model, arrays):
  x = jnp.zeros((1, model.input_size, model.input_size, model.channels))
  zero = jnp.zeros(1)
  y = zero.astype(jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x, zero, y)
  state = {k[2:]: v for k, v in arrays.items() if k.startswith('w/')}
  params = convert_dmp.from_dmp(state, shapes['params'], model)
  back = convert_dmp.to_dmp(params, model)
  assert back.keys() == state.keys() | {'pos_embed'}
  for name, tensor in state.items():
    np.testing.assert_allclose(
      back[name], tensor, rtol=0, atol=1e-6 * (name == 'pos_embed')
    )
  return params


def apply(model, params, x, t, y):
  """Return output, intermediates and the official gates and loads."""
  out, seen = model.apply(
    {'params': params},
    x,
    t,
    y,
    capture_intermediates=True,
    mutable=['aux', 'intermediates'],
  )
  return (
    out,
    seen['intermediates'],
    official(model, transformer.stack_sown(seen['aux'])),
  )


def scanned(model):
  """Return (params, ...) -> (output, what was sown), quicker to compile."""

  def run(params, *args, **kwargs):
    params = transformer.stack_blocks(params)
    return model.clone(scan=True).apply(
      {'params': params}, *args, mutable='aux', **kwargs
    )

  return run


def official(model, values):
  """Return the gates and loads of the blocks with prompts."""
  depth = model.hooks.token.depth
  load = values['prompt_drawn'][:, None] * values['prompt_load'].sum(1)
  return {'gates': values['prompt_gates'][:depth], 'load': load[:depth]}


def guided(denoise, model, meta, arrays):
  """Return both halves of the official output; ours is the first one."""
  doc = meta['arrays']['out/cfg']['doc']
  scale, channels = float(re.search(r'scale=([\d.]+)', doc)[1]), 3
  t, y = (jnp.asarray(arrays[f'in/cfg_{k}']) for k in 'ty')
  half = len(y) // 2
  x = last(arrays['in/x'])[:half]
  mixed = guidance.cfg(
    denoise, y[:half], scale, model.null_label, channels=channels
  )(x, t[:half])
  null = denoise(jnp.concatenate([x, x]), t, y)[half:]
  other = jnp.concatenate([mixed[..., :channels], null[..., channels:]], -1)
  return first(jnp.concatenate([mixed, other]))


def alone(model, params, cfg, arrays):
  """Return what the gate gives for a recorded conditioning."""
  u = arrays['in/gate_input'][:, None]
  n, k = cfg['num_tokens'], cfg['k']

  @jax.jit
  def gates(params):
    context = adaln.Context(c=u, t_embed=u)
    shared = model.hooks.prepare.apply({'params': params}, context)
    logits, out = shared[prompts.SHARED], {}
    for name in arrays:
      found = re.fullmatch(r'out/gate_(eval|train|train_load)_depth(\d+)', name)
      if found is None:
        continue
      clean = logits.at(int(found[2]))
      noisy = clean + logits.std * arrays['in/gate_noise']
      if found[1] != 'train_load':
        out[name] = gating.mix(clean if found[1] == 'eval' else noisy, k)
      elif k < n:
        out[name] = gating.chance(clean, noisy, logits.std, k).sum(0)
      else:
        out[name] = jnp.zeros(n)
    return out

  return gates(params['prepare_hook'])


def recorded(model, draws):
  """Return the model with the recorded noise of its gates."""
  draws = jnp.asarray(draws)

  class Recorded(prompts.Prompts):
    def noise(self, layer, keys):
      return draws[jnp.minimum(layer, len(draws) - 1)]

  hook = model.hooks.token
  fields = prompts.Prompts.__dataclass_fields__.keys() - {'parent', 'name'}
  token = Recorded(**{name: getattr(hook, name) for name in fields})
  return model.clone(hooks=dataclasses.replace(model.hooks, token=token))


def weight(name):
  kind, _, gamma = name.rpartition('_')
  if kind == 'min_snr':
    return functools.partial(noise.min_snr, gamma=float(gamma))
  return {'constant': noise.unit_weight}[name]


def trained(model, params, cfg, arrays):
  """Return the outputs, losses and gradients of a training step."""
  model = recorded(model, arrays['in/train_gate_noise'])
  x, t, y = last(arrays['in/x']), arrays['in/t_train'], arrays['in/y']
  x0, eps = last(arrays['in/x0']), last(arrays['in/noise'])
  drop = arrays['in/drop_uniform'] < cfg['class_dropout_prob']
  more = dict(
    drop=drop if model.null_label is not None else None,
    keys=jax.random.split(jax.random.key(0), len(x)),
  )

  def run(params, x):
    out, sown = scanned(model)(params, x, t, y, **more)
    return out, transformer.stack_sown(sown)

  names = [k.split('/')[1] for k in arrays if re.match('out/loss.*/loss$', k)]
  kinds = [Gaussian(weight=weight(n.removeprefix('loss_'))) for n in names]
  balance = Balance(form='official')
  x_t = kinds[0].corrupt(x0, eps, t)

  def score(out, values):
    """Return the losses of all kinds, then the regularisers, and all parts."""
    total, both = balance(values, t, jnp.ones(len(x)))
    means, parts = [], {}
    for name, process in zip(names, kinds, strict=True):
      loss, named = process.loss(out, x0, eps, x_t, t)
      named['mse'] = loss - named['vb']  # as weighted
      named |= {**both, 'loss': loss + total}
      parts |= {f'out/{name}/{k}': v for k, v in named.items()}
      means.append((loss + total).mean())
    return jnp.stack([*means, total]), parts

  forward = jax.jit(run)
  pull = jax.jit(lambda params, c: jax.vjp(run, params, x_t)[1](c)[0])
  slopes, parts = jax.device_get(
    jax.jit(jax.jacrev(score, (0, 1), has_aux=True))(*forward(params, x_t))
  )
  got, values = forward(params, x)
  out = {'out/train': first(got), **parts}
  out |= {f'out/train_{k}': v for k, v in official(model, values).items()}
  for i, name in enumerate((*names, 'regularisers_only')):
    grads = jax.device_get(
      pull(params, jax.tree.map(lambda g, i=i: g[i], slopes))
    )
    back = convert_dmp.to_dmp(grads, model)
    out |= {f'grad/{name}/{k}': v for k, v in back.items()}
  return out
