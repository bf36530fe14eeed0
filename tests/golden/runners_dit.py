"""Run the recorded cases of DiT.

Each runner takes the sidecar and the arrays of a case and returns what this
library computes for every array to check, driven by the sidecar.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import released
from released import first, last

from vfm_jax import convert_dit, guidance
from vfm_jax.models.dit import SIZES, DiT
from vfm_jax.nn import adaln, layers
from vfm_jax.nn.transformer import stack_blocks
from vfm_jax.ops import positions


def run_a_dit_posembed(meta: dict, arrays: dict) -> dict:
  (pairs,) = meta['config'].values()
  out = {f'out/pos_{d}_{n}': table(n, d) for d, n in pairs}
  rows, dim = arrays['out/pos_1d'].shape
  out['out/pos_1d'] = positions.sincos_1d(np.arange(rows) / 2, dim)
  # Rows of zeros for class tokens in front: they are not in the model.
  rows, dim = arrays['out/pos_cls_extra'].shape
  grid = table(next(n for d, n in pairs if d == dim), dim)
  zeros = np.zeros((rows - len(grid), dim))
  out['out/pos_cls_extra'] = np.concatenate([zeros, grid])
  x, t = jnp.zeros((1, 32, 32, 4)), jnp.zeros(1)
  counts = []
  for size in SIZES:
    model = DiT(size=size, patch=2, scan=True)
    params = jax.eval_shape(model.init, jax.random.key(0), x, t)['params']
    trained = sum(p.size for p in jax.tree.leaves(params))
    fixed = np.prod(model.built_grid) * model.dims.width
    counts.append([trained + fixed, trained])
  out['out/param_counts'] = np.array(counts)
  return out


def run_a_dit_forward(meta: dict, arrays: dict) -> dict:
  cfg = meta['config']
  model = released.dit(cfg)
  x, t, y = last(arrays['in/x']), arrays['in/t'], arrays['in/y']
  t_frac, forced = arrays['in/t_frac'], arrays['in/force_drop_ids'] == 1
  params = released.dit_params(model, arrays)
  # Scanned, it is quicker to compile.
  fast, stacked = model.clone(scan=True), jax.jit(stack_blocks)(params)

  @jax.jit
  def forward(params, x, t, y, drop):
    return fast.apply({'params': params}, x, t, y, drop=drop)

  def run(x, t, y, drop=None):
    none = np.zeros(len(x), bool)
    time = np.asarray(t, np.float32)
    return forward(stacked, x, time, y, none if drop is None else drop)

  def loss(params, x):
    out = fast.apply({'params': params}, x, t, y)
    return (out * last(arrays['in/cotangent'])).sum() / len(x)

  grad = jax.jit(jax.value_and_grad(loss, (0, 1)))
  value, (grads, x_grad) = grad(stacked, x)
  grads = convert_dit.to_dit(jax.device_get(grads), fast)
  order = meta['mapping']['grad_norm_order']
  drop = arrays['in/drop_uniform'] < cfg['class_dropout_prob']
  y_forced = np.where(forced, model.null_label, y)
  odd = arrays['out/t_freq_odd'].shape[1]
  label = adaln.LabelEmbed(*params['y_embed']['table'].shape)

  @jax.jit
  def compute(params):
    return {
      'out/t_freq': positions.time_features(t, 256),
      'out/t_freq_frac': positions.time_features(t_frac, 256),
      'out/t_freq_odd': positions.time_features(t_frac, odd),
      **intermediates(model, params, x, t, y, arrays),
      'out/y_emb_forced': label.apply({'params': params['y_embed']}, y_forced),
      **units(model, params, arrays),
    }

  return {
    **compute(params),
    'out/eval_t_frac': first(run(x, t_frac, y)),
    'out/drop_mask': drop.astype(np.uint8),
    'out/train_drop': first(run(x, t, y, drop)),
    'out/y_forced': y_forced,
    'out/eval_forced': first(run(x, t, y, forced)),
    **guided(model, run, cfg, arrays),
    'out/loss': value,
    **{
      name: grads[name.removeprefix('grad/')]
      for name in arrays
      if name.startswith('grad/') and name != 'grad/@x'
    },
    'grad/@x': first(x_grad),
    'out/grad_norm_all': [np.linalg.norm(grads[n].ravel()) for n in order],
  }


def table(n, dim):
  return positions.sincos_2d((n, n), dim, first='w')


def intermediates(model, params, x, t, y, arrays):
  value, seen = model.apply(
    {'params': params}, x, t, y, capture_intermediates=True
  )
  seen = seen['intermediates']
  names = {
    'x_embed': 'patch_embed',
    't_emb': 't_embed',
    'y_emb': 'y_embed',
    'final_tokens': 'final',
  }
  out = {'out/eval': first(value)}
  for name in arrays:
    if name.startswith('out/inter/'):
      path = name.removeprefix('out/inter/')
      path = re.sub(r'block(\d+)', r'blocks_\1', names.get(path, path))
      node = seen[path.removesuffix('_attn')]
      node = node['attn'] if path.endswith('_attn') else node
      out[name] = node['__call__'][0]
  return out


def guided(model, forward, cfg, arrays):
  """Return both halves of the official output; ours is the first one."""
  x, t, y = last(arrays['in/cfg_x']), arrays['in/cfg_t'], arrays['in/cfg_y']
  b, channels = len(x) // 2, 3
  x, t = x[:b], jnp.asarray(t[:b])
  assert (y[b:] == model.null_label).all()
  null = forward(x, t, y[b:])
  out = {}
  for i, scale in enumerate(cfg['scales']):
    half = guidance.cfg(
      forward, jnp.asarray(y[:b]), scale, model.null_label, channels=channels
    )(x, t)
    other = jnp.concatenate([half[..., :channels], null[..., channels:]], -1)
    out[f'out/cfg_{i}'] = first(jnp.concatenate([half, other]))
  return out


def units(model, params, arrays):
  h, c = arrays['in/unit/h'], arrays['in/unit/c'][:, None]
  width = int(model.dims.width * model.mlp_ratio)
  block = adaln.AdaLNBlock(model.dims.heads, width)
  mlp = layers.Mlp(width, gelu='tanh')
  final = adaln.FinalLayer(params['final']['linear']['bias'].size)
  start = params['blocks_0']
  return {
    'out/unit/block0': block.apply(
      {'params': start}, h, adaln.Context(c=jnp.asarray(c))
    ),
    'out/unit/mlp0': mlp.apply(
      {'params': start['mlp']}, arrays['in/unit/mlp_in']
    ),
    'out/unit/final_layer': final.apply({'params': params['final']}, h, c),
  }
