import json

import numpy as np
import pytest
from PIL import Image

from vfm_jax.evals import base, convergence
from vfm_jax.evals.convergence import Convergence


def write(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  rows = [
    {
      'step': step,
      'loss': 1.0,
      'hard/loss30_500-999': 1.0 / step,
      'hard/loss30_0-9': 2.0,
      'hard/loss30_10-499': float(step),
    }
    for step in (1, 2, 4)
  ]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return path


def test_reads_the_curves_of_a_run(tmp_path):
  path = write(tmp_path)
  curves = convergence.read_curves(path, 'hard')
  assert curves.bounds == (0, 10, 500, 1000)
  expected = [[2, 1, 1], [2, 2, 0.5], [2, 4, 0.25]]
  np.testing.assert_array_equal(curves.losses, expected)
  with pytest.raises(ValueError, match="evaluator named 'easy'"):
    convergence.read_curves(path, 'easy')


def test_when_losses_have_converged():
  losses = np.array([[1.0, 1, 1], [0.5, 1, 0], [0.5, 2, 0.5], [0, 1, 0]])
  got = convergence.steps_to_converge(np.array([0, 10, 20, 30]), losses)
  np.testing.assert_allclose(got, [28, np.nan, 9])


def test_reports_and_draws_in_a_run(tmp_path):
  write(tmp_path)
  evaluator = Convergence('hard', share=0.5)
  assert isinstance(evaluator, base.Evaluator)
  assert isinstance(evaluator, base.InRun)
  inside = evaluator.in_run(str(tmp_path), 'fast')
  got = inside.run(None, None, seed=0)
  assert list(got) == ['steps50_0-9', 'steps50_10-499', 'steps50_500-999']
  np.testing.assert_allclose(list(got.values()), [np.nan, np.nan, 1.75])
  with Image.open(tmp_path / 'evals/fast/curves.png') as picture:
    assert min(picture.size) > 300
  # A folder and a file that are named stay.
  named = Convergence('hard', metrics='a', folder='b')
  assert named.in_run(str(tmp_path), 'fast') == named


def test_refuses():
  with pytest.raises(ValueError, match='file in `metrics`, found None'):
    Convergence().run(None, None, seed=0)
  with pytest.raises(ValueError, match='`share` above 0 to 1, found 0'):
    Convergence(share=0.0)
