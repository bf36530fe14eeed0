"""Probe a frozen encoder with a linear layer while it stays in the loop.

The online protocol of the TWLV-I report (arXiv:2408.11318, Table 4): clips are
drawn and augmented anew in each pass, and at test the probabilities of all
views of a video (crops times clips) are averaged. Its numbers are not those of
the offline probe of `evals/linear.py`.
"""

import dataclasses
from typing import Literal

import jax
from flax import linen as nn

from vfm_jax import optim
from vfm_jax.evals.head_probe import HeadProbe
from vfm_jax.evals.heads import Training

# Table 4 for Kinetics-400. It names no optimizer; SGD with momentum is ours,
# for its rates and zero decay are those of linear probes with SGD or LARS.
TRAINING = Training(
  lrs=(0.1,), epochs=150, warmup_epochs=10, batch=1024, method=optim.sgd
)


class LinearHead(nn.Module):
  """Map an embedding [B, D] to logits [B, num_classes], with a bias.

  Weights and bias start from U(-1 / sqrt(D), 1 / sqrt(D)).
  """

  num_classes: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Return the logits."""
    bound = x.shape[-1] ** -0.5

    def uniform(key, shape, dtype):
      return jax.random.uniform(key, shape, dtype, -bound, bound)

    dense = nn.Dense(
      self.num_classes,
      kernel_init=uniform,
      bias_init=uniform,
      precision=jax.lax.Precision.HIGHEST,
    )
    return dense(x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineLinearProbe(HeadProbe):
  """Train a linear layer on clip embeddings; fields as `HeadProbe`.

  The objective satisfies `Embeds`.
  """

  training: Training = TRAINING

  @property
  def reads(self) -> Literal['embed']:
    """One vector a clip."""
    return 'embed'

  @property
  def task(self) -> Literal['lp']:
    """The table of linear probes."""
    return 'lp'

  @property
  def name(self) -> str:
    """Protocol name that metric names carry."""
    return 'online_linear'

  def head(self, num_classes: int) -> LinearHead:
    """Return the linear layer."""
    return LinearHead(num_classes)
