"""Call the attention of others: splash, tokamax and torch."""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vfm_jax.ops.attention_spec import Spec

# Splash takes lengths that 128 divides.
_LANES = 128


def splash(block: int | None) -> Callable[..., jax.Array]:
  """Return splash attention, with blocks of a size; None for whole rows.

  Tokens are padded to a multiple of 128 and told apart by segment ids.
  """

  def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as lib

    n, heads = q.shape[1], q.shape[2]
    length = -(-n // _LANES) * _LANES
    pad = ((0, 0), (0, length - n), (0, 0), (0, 0))
    q, k, v = (jnp.pad(x, pad).swapaxes(1, 2) for x in (q, k, v))
    size = block or length
    kernel = lib.make_splash_mha_single_device(
      lib.MultiHeadMask([lib.FullMask((length, length))] * heads),
      block_sizes=lib.BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=size,
        use_fused_bwd_kernel=True,
      ),
    )
    here = (jnp.arange(length) < n).astype(jnp.int32)
    segments = lib.SegmentIds(here, here) if length > n else None
    q = q * q.shape[-1] ** -0.5
    out = jax.vmap(lambda q, k, v: kernel(q, k, v, segments))(q, k, v)
    return out.swapaxes(1, 2)[:, :n]

  return attend


def tokamax(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Return the attention that tokamax chooses."""
  import tokamax as lib

  return lib.dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)


def torch_step(size: tuple[int, ...]) -> Callable[[], None]:
  """Return a pass of torch's attention on CPU, forward and backward.

  Args:
    size: (B, N, H, D).
  """
  import torch

  b, n, h, d = size
  q, k, v = (torch.randn(b, h, n, d, requires_grad=True) for _ in range(3))
  do = torch.randn(b, h, n, d)
  attend = torch.nn.functional.scaled_dot_product_attention

  def step():
    torch.autograd.grad(attend(q, k, v), (q, k, v), do)

  return step


def _refuse_splash(spec: Spec) -> str | None:
  if spec.platform != 'tpu':
    return f'needs a TPU, found {spec.platform}'
  return None


def _refuse_tokamax(spec: Spec) -> str | None:
  if not importlib.util.find_spec('tokamax'):
    return 'is not installed'
  if spec.platform == 'cpu':
    return 'needs an accelerator, found cpu'
  return None


# Reason to refuse, and the function (q, k, v) -> out, by name.
PEERS: Mapping[str, tuple[Callable[[Spec], str | None], Any]] = {
  'splash, blocks of 128': (_refuse_splash, splash(_LANES)),
  'splash, whole rows': (_refuse_splash, splash(None)),
  'tokamax': (_refuse_tokamax, tokamax),
}
