import pickle

import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.evals import tal_decode
from vfm_jax.evals.store import StoreError
from vfm_jax.evals.tal_decode import Decoding, Proposals
from vfm_jax.models.temporal_localization import Found


def test_points_give_segments_of_their_level():
  logits = np.full((4, 2), -20.0), np.full((2, 2), -20.0)
  logits[0][3, 1] = 2.0
  logits[1][1, 0] = 3.0
  offsets = np.tile([0.5, 1.0], (4, 1)), np.tile([0.5, 1.0], (2, 1))
  masks = np.ones(4, bool), np.ones(2, bool)

  def on_device():
    parts = (tuple(map(jnp.array, x)) for x in (logits, offsets, masks))
    return Found(*parts)

  found = Decoding().read_off(on_device())
  assert found.segments.tolist() == [[2.5, 4.0], [1.0, 4.0]]
  assert found.labels.tolist() == [1, 0]
  masks[0][3] = False
  found = Decoding(min_duration=3.5).read_off(on_device())
  assert not len(found.scores)
  assert not len(Decoding().thin_out(found).scores)


def test_fusion_keeps_the_ranking_within_a_class():
  spans = np.array([[0, 1], [2, 3], [4, 5]], np.float32)
  found = Proposals(
    spans, np.array([0.2, 0.9, 0.5], np.float32), np.zeros(3, int)
  )
  fused = tal_decode.fuse(found, np.full(4, 0.25), topk=2, count=2)
  assert fused.labels.tolist() == [0, 0, 1, 1]
  assert fused.segments[:, 0].tolist() == [2, 4, 2, 4]
  np.testing.assert_allclose(fused.scores[0], np.sqrt(0.25 * 0.9), rtol=1e-6)


def test_class_scores_are_read_and_pickles_run_nothing(tmp_path):
  path = tmp_path / 'scores.pkl'
  path.write_bytes(pickle.dumps({'v': np.array([0.5, 0.25], np.float32)}))
  assert tal_decode.read_class_scores(str(path))['v'].tolist() == [0.5, 0.25]
  path.write_bytes(pickle.dumps({'v': pickle.Unpickler}))
  with pytest.raises(StoreError, match=r'scores\.pkl: unreadable class scores'):
    tal_decode.read_class_scores(str(path))
  path = tmp_path / 'scores.json'
  path.write_text('{"v": [[0.5, 0.25]], "w": [NaN]}')
  with pytest.raises(StoreError, match="scores of 'w' are empty or not finite"):
    tal_decode.read_class_scores(str(path))
