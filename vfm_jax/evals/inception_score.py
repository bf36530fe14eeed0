"""Score samples by how sure and how varied a classifier finds them."""

import numpy as np

SPLIT = 5000


def inception_score(logits: np.ndarray, *, split: int = SPLIT) -> float:
  """Return the mean over splits of exp(E KL(p(y|x) || p(y))).

  See arXiv:1606.03498, section 4. The evaluator of ADM takes splits of 5,000
  samples, the last one as large as it comes.

  Args:
    logits: [N, C] of the classifier, in the order of the samples.
    split: samples that share one p(y).
  """
  logits = np.asarray(logits, np.float64)
  scores = []
  for first in range(0, len(logits), split):
    part = logits[first : first + split]
    log_p = part - part.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    p = np.exp(log_p)
    # A class that no sample could be adds nothing.
    marginal = np.log(np.maximum(p.mean(0), np.finfo(np.float64).tiny))
    scores.append(np.exp((p * (log_p - marginal)).sum(1).mean()))
  return float(np.mean(scores))
