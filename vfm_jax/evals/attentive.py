"""Probe all tokens of a frozen encoder with a learned query.

The attentive probe of V-JEPA (arXiv:2404.08471) as the TWLV-I report
(arXiv:2408.11318) has it: one query attends to the patch tokens, an MLP block
and a linear layer follow; AdamW, cosine to 0, no warm-up. With a grid of
learning rates and weight decays (V-JEPA 2, arXiv:2506.09985) all heads learn
under one vmap.
"""

import dataclasses
import functools
from typing import Literal

from vfm_jax import optim
from vfm_jax.evals.head_probe import HeadProbe
from vfm_jax.evals.heads import Training
from vfm_jax.models.attentive import AttentiveClassifier, AttentivePooler

# The report's setting for video. The bound on the gradient is that of
# V-JEPA's code; the report names neither it nor the optimizer.
TRAINING = Training(
  lrs=(1e-3,),
  wds=(1e-5,),
  epochs=20,
  batch=256,
  method=functools.partial(optim.adam, b2=0.999),
  clip_norm=1.0,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentiveProbe(HeadProbe):
  """Train an attentive classifier on tokens; fields as `HeadProbe`.

  The objective satisfies `EmbedsTokens`.

  Attributes:
    pooler: attends to the tokens. `heads` shall be that of the encoder; `side`
      says where further blocks stand if `depth` is above 1: on the pooled
      query as in V-JEPA, or on the tokens as in V-JEPA 2.
    training: how the heads learn.
  """

  pooler: AttentivePooler
  training: Training = TRAINING

  @property
  def reads(self) -> Literal['tokens']:
    """All tokens of a clip."""
    return 'tokens'

  @property
  def task(self) -> Literal['ap']:
    """The table of attentive probes."""
    return 'ap'

  @property
  def name(self) -> str:
    """Protocol name that metric names carry."""
    p = self.pooler
    return 'attentive' if p.depth == 1 else f'attentive_{p.side}{p.depth}_'

  def head(self, num_classes: int) -> AttentiveClassifier:
    """Return the classifier."""
    return AttentiveClassifier(num_classes, self.pooler)
