"""Describe a call of attention without its arrays."""

import dataclasses

# The name that kernels give, with `jax.ad_checkpoint.checkpoint_name`, to what
# their backward pass needs besides q, k and v: the output and the log-sum-exp.
# A policy of rematerialisation saves it instead of running the kernel again.
RESIDUAL = 'attention_residual'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  """Describe a call, so that it can be resolved without hardware.

  It is what one device computes: batch and heads are divided by the mesh
  already, where they divide.

  Attributes:
    platform: 'cpu', 'gpu' or 'tpu'.
    dtype: name of the element type of q, k and v.
    head_dim: features of one head.
    batch: number of examples B.
    queries: number of queries N.
    keys: number of keys and values M.
    heads: number of heads of the queries.
    kv_heads: number of heads of the keys and values, a divisor of `heads`.
    masked: whether a mask is given.
    segments: whether segment ids are given, which needs N = M.
    logit_cap: whether the logits are capped.
    device_kind: what the device calls itself, as 'TPU v5 lite'; '' if unknown.
    capability: compute capability of a CUDA device, (9, 0) for Hopper; None
      for other devices, or if unknown.
    jax: version of JAX, as (0, 12, 0).
    undivided: why the mesh can not cut the call into one a device; '' if it
      can, or if there is one device.
  """

  platform: str
  dtype: str
  head_dim: int
  batch: int
  queries: int
  keys: int
  heads: int
  kv_heads: int
  masked: bool = False
  segments: bool = False
  logit_cap: bool = False
  device_kind: str = ''
  capability: tuple[int, int] | None = None
  jax: tuple[int, ...] = ()
  undivided: str = ''
