"""Check that the online probes are set up as the report's Table 4 says."""

import numpy as np
import pytest

from vfm_jax.data.synthetic import MovingShapes
from vfm_jax.evals import recognition

SOURCES = (MovingShapes(count=1024, size=24), MovingShapes(count=2, size=24))


def test_linear_probe_of_the_report():
  probe = recognition.linear('K400', *SOURCES, 'shape', size=16, eval_batch=4)
  assert probe.name == 'online_linear'
  t = probe.training
  assert (t.lrs, t.wds, t.batch) == ((0.1,), (0.0,), 1024)
  assert (t.epochs, t.warmup_epochs) == (150, 10)
  batches = list(probe.val.eval_batches(4))
  assert sum(len(b['video']) for b in batches) == 2 * 3 * 4
  assert batches[0]['video'].shape == (4, 16, 16, 16, 3)
  # The crops of a square video coincide.
  np.testing.assert_array_equal(*batches[0]['video'][:2])
  assert recognition.linear('SSv2', *SOURCES, 'shape').val.views == 3


def test_attentive_probe_of_the_report():
  probe = recognition.attend('DV48', *SOURCES, 'shape', heads=3, wds=(0.0, 1.0))
  assert probe.pooler.heads == 3
  t = probe.training
  assert (t.lrs, t.epochs, t.warmup_epochs) == ((1e-3,), 50, 0)
  assert (t.batch, t.grid) == (256, ((1e-3, 0.0), (1e-3, 1.0)))
  assert probe.benchmark == 'DV48'
  assert probe.task == 'ap'


def test_unknown_data_sets_are_refused():
  with pytest.raises(ValueError, match=r"'UCF'.*K400"):
    recognition.linear('UCF', *SOURCES, 'shape')
