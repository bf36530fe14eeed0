"""Run the recorded cases of DTR and Switch-DiT.

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

from vfm_jax import convert_dit, guidance, samplers
from vfm_jax.models import switch
from vfm_jax.models.routing import Routing
from vfm_jax.nn import adaln
from vfm_jax.nn.transformer import stack_blocks, stack_sown
from vfm_jax.objectives import prior
from vfm_jax.ops import noise, routing
from vfm_jax.ops.diffusion import Gaussian, unit_range

SCHEDULES = {'linear': noise.linear, 'cosine': noise.cosine}


def run_d_dtr_masks(meta: dict, arrays: dict) -> dict:
  (settings,) = (v for k, v in meta['config'].items() if k.startswith('masks'))
  out = {}
  for levels, channels, alpha, beta in settings:
    name = f'out/mask_T{levels}_C{channels}_a{alpha}_b{beta}'
    width = routing.width_of(channels, beta)
    shape = dict(alpha=alpha, levels=levels)
    table = routing.sliding_window(channels, width, **shape)
    out[name] = table.astype(np.uint8)
    out[f'{name}_start'] = routing.starts(channels, width, **shape)
    out[f'{name}_width'] = np.asarray(width)
  return out


def forward_of(model):
  """Return (params, x, t, y, drop) -> (output, values of the blocks)."""

  @jax.jit
  def forward(params, x, t, y, drop):
    out, seen = model.apply(
      {'params': params},
      x,
      t.astype(jnp.float32),
      y,
      drop=drop,
      tau=t,
      capture_intermediates=lambda module, _: isinstance(
        module, adaln.AdaLNBlock | switch.Experts
      ),
      mutable=['intermediates', 'aux'],
    )
    return out, seen

  def run(params, x, t, y, drop=None):
    none = np.zeros(len(x), bool)
    drop = none if drop is None else drop
    return jax.device_get(forward(params, x, t, y, drop))

  return run


def guided(forward, model, params, cfg, arrays):
  """Return both halves of the official output; all channels are guided."""
  x, t, y = last(arrays['in/x']), arrays['in/cfg_t'], arrays['in/cfg_y']
  b = len(y) // 2
  assert (y[b:] == model.null_label).all()
  # The first rows of x, twice.
  x, t, outputs = x[:b], jnp.asarray(t[:b]), []

  def denoise(x, t, y):
    outputs.append(forward(params, x, t, y)[0])
    return outputs[0]

  half = guidance.cfg(
    denoise, jnp.asarray(y[:b]), cfg['scale'], model.null_label
  )(x, t)
  moved, null = cfg['in_channels'], outputs[0][b:]
  other = jnp.concatenate([half[..., :moved], null[..., moved:]], -1)
  return first(jnp.concatenate([half, other]))


def run_d_dtr_forward(meta: dict, arrays: dict) -> dict:
  cfg = meta['config']
  hook = Routing(alpha=cfg['alpha'], beta=cfg['ratio'])
  model = released.dit(cfg, adaln.Hooks(mask=hook))
  x, t, y = last(arrays['in/x']), arrays['in/t'], arrays['in/y']
  params = released.dit_params(model, arrays)
  forward = forward_of(model)
  value, seen = forward(params, x, t, y)
  blocks = seen['intermediates']

  fast, stacked = model.clone(scan=True), jax.jit(stack_blocks)(params)

  def loss(params):
    out = fast.apply({'params': params}, x, t.astype(np.float32), y, tau=t)
    return (out * last(arrays['in/cotangent'])).sum() / len(x)

  total, grads = jax.jit(jax.value_and_grad(loss))(stacked)
  grads = convert_dit.to_dit(jax.device_get(grads), fast)
  drop = arrays['in/drop_uniform'] < cfg['class_dropout_prob']
  single = released.dit(cfg, num_classes=1, label_dropout=0.0)
  zero = jnp.zeros(1)
  shapes = jax.eval_shape(
    single.init, jax.random.key(0), x[:1], zero, zero.astype(jnp.int32)
  )
  return {
    'out/active_mask': hook.table(model.dims.width, 0)[t].astype(np.uint8),
    'out/eval': first(value),
    **{
      name: blocks[f'blocks_{name.rsplit("block")[-1]}']['__call__'][0]
      for name in arrays
      if name.startswith('out/inter/block')
    },
    'out/cfg': guided(forward, model, params, cfg, arrays),
    'out/train_drop': first(forward(params, x, t, y, drop=drop)[0]),
    'out/loss': total,
    **{n: grads[n[5:]] for n in arrays if n.startswith('grad/')},
    'out/uncond_label_rows': len(shapes['params']['y_embed']['table']),
    **loops(fast, stacked, arrays, y),
  }


def loops(model, params, arrays, y):
  """Return what the sampling loops give, by schedule and respacing."""

  def denoise(x, t):
    time, labels = t.astype(jnp.float32), jnp.asarray(y[: len(x)])
    return model.apply({'params': params}, x, time, labels, tau=t)

  out = {}
  z, draws = last(arrays['in/loop_z']), last(arrays['in/loop_noise'])
  for name in arrays:
    found = re.fullmatch(r'out/loop_([a-z]+)_((?:ddim)?\d+)', name)
    if not found:
      continue
    process = Gaussian(schedule=SCHEDULES[found[1]])
    _, samples = samplers.ddpm(
      denoise,
      process,
      z,
      None,
      steps=found[2],
      restrict=unit_range,
      noise=draws,
      record=lambda x, p: x,
    )
    out[name] = first(samples)
    out['out/loop_timestep_map'] = process.respaced(found[2]).kept
  return out


def run_e_switch_dit(meta: dict, arrays: dict) -> dict:
  cfg = meta['config']
  model = released.dit(cfg, switch.switch(cfg['E'], top_k=cfg['k']))
  x, t, y = last(arrays['in/x']), arrays['in/t'], arrays['in/y']
  params = released.dit_params(model, arrays)
  forward = forward_of(model)
  value, seen = forward(params, x, t, y)
  sown = jax.device_get(stack_sown(seen['aux']))
  out = {'out/eval': first(value), **gates(sown, t, cfg)}
  for i in range(cfg['depth']):
    block = seen['intermediates'][f'blocks_{i}']
    out[f'out/inter/block{i}'] = block['__call__'][0]
    out[f'out/inter/mask{i}'] = block['mask_hook']['__call__'][0]
  out['out/cfg'] = guided(forward, model, params, cfg, arrays)
  orders = tuple(jnp.argsort(arrays[f'in/rand_{k}']) for k in ('gate', 'prior'))
  return {
    **out,
    **matching(sown, cfg, orders),
    **divergences(arrays),
    **training(model, params, forward, cfg, arrays, orders),
    **tables(arrays),
  }


def gates(sown, t, cfg):
  """Return the gates of all levels, and those of the batch by expert."""
  out = {}
  for i, (p, top) in enumerate(
    zip(sown[switch.LEVELS], sown[switch.TOP], strict=True)
  ):
    chosen = np.zeros((len(p), cfg['E']), np.uint8)
    np.put_along_axis(chosen, np.asarray(top), 1, 1)
    out |= {
      f'out/gate/probs_{i}': p,
      f'out/gate/topk_index_{i}': np.asarray(top, np.int64),
      f'out/gate/chosen_{i}': chosen,
    }
    # Ours sorts no rows here: the official lists follow from the gates.
    active = np.asarray(sown[switch.GATES][i])
    expert, row = np.nonzero(chosen[t].T)
    out |= {
      f'out/inter/active_probs{i}': active,
      f'out/inter/batch_gates{i}': active[row, expert],
      f'out/inter/batch_index{i}': row,
      f'out/inter/expert_size{i}': chosen[t].sum(0, dtype=np.int64),
    }
  return out


def matching(sown, cfg, orders):
  """Return the matching, with the columns in the recorded orders."""
  active = cfg['k'] * cfg['depth']

  @jax.jit
  def match(top, orders):
    used = prior.used_columns(top, cfg['E'])
    table = prior.prior_columns(used.shape[1], active)
    cost = prior.matching_cost(used, table)
    return table, cost, prior.DiffusionPrior().match(cost, orders)

  table, cost, match = jax.device_get(match(sown[switch.TOP], orders))
  rows = np.arange(len(match))
  np.testing.assert_array_equal(np.sort(match), rows)
  return {
    'out/prior/unit_mapping': table.astype(np.uint8),
    'out/prior/gate_perm': orders[0],
    'out/prior/prior_perm': orders[1],
    'out/prior/cost': cost[orders[0]][:, orders[1]].astype(np.float32),
    'out/prior/cost_optimum': cost[rows, match].sum(),
    'out/prior/matched_mask': table[:, match].astype(np.uint8),
  }


def divergences(arrays):
  def mean(p, q):
    return prior.divergence(p, q).mean()

  @jax.jit
  def compute():
    out = {}
    for name in arrays:
      if found := re.fullmatch(r'(out|grad)/(jsd\w*?)(_p)?', name):
        p, q = (jnp.asarray(arrays[f'in/{found[2]}_{k}']) for k in 'pq')
        out[name] = (jax.grad(mean) if found[1] == 'grad' else mean)(p, q)
    return out

  return compute()


def training(model, params, forward, cfg, arrays, orders):
  """Return losses and gradients with recorded noise and label drop."""
  process = Gaussian(schedule=SCHEDULES[cfg['schedule']])
  auxiliary = functools.partial(
    prior.DiffusionPrior(cfg['w_JSD']), orders=orders
  )
  t, y = jnp.asarray(arrays['in/t_train']), jnp.asarray(arrays['in/y'])
  x, eps = last(arrays['in/x']), last(arrays['in/noise'])
  drop = arrays['in/drop_uniform'] < cfg['class_dropout_prob']
  plain, seen = forward(params, x, t, y, drop)
  ones = jnp.ones(len(t))
  plain_aux, _ = jax.jit(auxiliary)(stack_sown(seen['aux']), t, ones)
  fast = model.clone(scan=True)

  def total(params, share):
    x_t = process.corrupt(x, eps, t)
    time = t.astype(jnp.float32)
    out, seen = fast.apply(
      {'params': params}, x_t, time, y, drop=drop, tau=t, mutable=['aux']
    )
    aux, _ = auxiliary(stack_sown(seen['aux']), t, ones)
    losses, parts = process.loss(out, x, eps, x_t, t)
    return share * losses.mean() + aux, (losses, parts, aux)

  grad = jax.jit(jax.value_and_grad(total, has_aux=True))
  stacked = jax.jit(stack_blocks)(params)
  (value, (losses, parts, aux)), grads = grad(stacked, 1.0)
  _, alone = grad(stacked, 0.0)
  grads = {
    'total': convert_dit.to_dit(jax.device_get(grads), fast),
    'aux_only': convert_dit.to_dit(jax.device_get(alone), fast),
  }
  found = {
    'out/train': first(plain),
    'out/aux_loss': plain_aux,
    'out/losses/loss': losses,
    'out/losses/aux': aux,
    'out/losses/total': value,
    **{f'out/losses/{k}': v for k, v in parts.items()},
  }
  for name in arrays:
    if name.startswith(('grad/total/', 'grad/aux_only/')):
      _, kind, key = name.split('/')
      found[name] = grads[kind][key]
  return found


def tables(arrays):
  """Return further priors and masks, as their names say."""
  out = {}
  for name in arrays:
    if found := re.fullmatch(r'out/prior_masks/depth(\d+)_E(\d+)_k(\d+)', name):
      depth, experts, k = map(int, found.groups())
      table = prior.prior_columns(depth * experts, depth * k)
      out[name] = np.asarray(table, np.uint8)
    elif found := re.fullmatch(
      r'out/dtr_mask_T(\d+)_C(\d+)_a([\d.]+)_b([\d.]+)', name
    ):
      levels, channels = int(found[1]), int(found[2])
      width = routing.width_of(channels, float(found[4]))
      table = routing.sliding_window(
        channels, width, alpha=float(found[3]), levels=levels
      )
      out[name] = table.astype(np.uint8)
  return out
