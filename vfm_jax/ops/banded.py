"""Attend to near neighbours in time only, at a cost linear in the length."""

import jax
import jax.numpy as jnp
import numpy as np


def banded_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  half: int,
  valid: jax.Array,
  bias: jax.Array | None = None,
  block: int = 16,
) -> jax.Array:
  """Return softmax(q k^T / sqrt(D) + bias) v over the keys |i - j| <= half.

  Queries are taken in blocks of `b = max(block, half)`, which meet the keys of
  three blocks: 3 b N scores a head instead of N^2. Softmax is float32. The
  window of ActionFormer (Zhang et al. 2022, section 3.2).

  Args:
    q: [B, N, H, D].
    k: [B, N, H, D].
    v: [B, N, H, D].
    half: neighbours on each side, 1 or more; a window of 2 half + 1.
    valid: bool [B, N]; other keys are not attended to.
    bias: [H, 2 half + 1] added to the scores of the keys i - half .. i + half.
    block: smallest block; it changes the speed and not the answer.

  Returns:
    [B, N, H, D] in the type of q; 0 where the query is not valid.

  Raises:
    ValueError: `half` is below 1.
  """
  if half < 1:
    raise ValueError(f'expected half >= 1 neighbours, found {half}')
  size, n, heads, dim = q.shape
  b = max(block, half)
  blocks = -(-n // b)
  over = blocks * b - n

  def around(x):
    """Return [B, blocks, 3 b, ...]: each block with the one on each side."""
    rest = ((0, 0),) * (x.ndim - 2)
    x = jnp.pad(x, ((0, 0), (b, over + b), *rest))
    x = x.reshape(size, blocks + 2, b, *x.shape[2:])
    return jnp.concatenate([x[:, :-2], x[:, 1:-1], x[:, 2:]], axis=2)

  queries = jnp.pad(q, ((0, 0), (0, over), (0, 0), (0, 0)))
  queries = queries.reshape(size, blocks, b, heads, dim)
  scores = jnp.einsum(
    'bnqhd,bnkhd->bnhqk',
    queries * dim**-0.5,
    around(k),
    preferred_element_type=jnp.float32,
  )
  offset = np.arange(3 * b) - b - np.arange(b)[:, None]
  band = np.abs(offset) <= half
  if bias is not None:
    scores += bias[:, np.clip(offset + half, 0, 2 * half)].astype(jnp.float32)
  allowed = around(valid)[:, :, None, None, :] & band
  weights = jax.nn.softmax(jnp.where(allowed, scores, -1e30), axis=-1)
  out = jnp.einsum('bnhqk,bnkhd->bnqhd', weights.astype(v.dtype), around(v))
  out = out.reshape(size, blocks * b, heads, dim)[:, :n]
  return jnp.where(valid[:, :, None, None], out, 0).astype(q.dtype)
