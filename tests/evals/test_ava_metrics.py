"""Check frame mAP and the files it is counted on."""

import numpy as np
import pytest

from vfm_jax.data import video
from vfm_jax.evals import ava_data, ava_metrics
from vfm_jax.evals.ava_data import FrameBoxes
from vfm_jax.evals.tas_data import AnnotationError

LEFT, RIGHT = [0.0, 0.0, 0.4, 1.0], [0.6, 0.0, 1.0, 1.0]


def boxes(*rows):
  """Hold rows (box, action, score)."""
  box, action, score = zip(*rows, strict=True)
  return FrameBoxes(np.array(box), np.array(action), np.array(score))


def test_average_precision_is_the_area_under_the_envelope():
  scores = np.array([0.5, 0.9, 0.7, 0.6])
  right = np.array([True, True, False, True])
  # Precision by rank: 1, 1/2, 2/3, 3/4; the envelope holds 3/4 for the last.
  out = ava_metrics.average_precision(scores, right, 4)
  assert out == pytest.approx((1 + 3 / 4 + 3 / 4) / 4)
  assert ava_metrics.average_precision(scores[:0], right[:0], 4) == 0


def test_a_box_is_found_once_and_by_the_best_first():
  truth = {('v', 902): boxes((LEFT, 1, 1.0), (RIGHT, 1, 1.0))}
  twice = {('v', 902): boxes((LEFT, 1, 0.9), (LEFT, 1, 0.8), (RIGHT, 1, 0.7))}
  value, each = ava_metrics.frame_map(truth, twice, [1, 2])
  assert value == each[1] == pytest.approx((1 + 2 / 3) / 2)


def test_only_the_true_box_that_is_overlapped_most_counts():
  near = [0.05, 0.0, 0.45, 1.0]
  truth = {('v', 1): boxes((LEFT, 1, 1.0), (near, 1, 1.0))}
  found = {('v', 1): boxes((LEFT, 1, 0.9), ([0.01, 0, 0.41, 1], 1, 0.8))}
  # The second is nearest to the first box, which is taken.
  value, _ = ava_metrics.frame_map(truth, found, [1])
  assert value == pytest.approx(0.5)


def test_classes_and_frames_that_do_not_count():
  truth = {
    ('v', 1): boxes((LEFT, 1, 1.0), (LEFT, 7, 1.0)),
    ('v', 2): boxes((RIGHT, 2, 1.0)),
  }
  found = {
    ('v', 1): boxes((LEFT, 1, 0.5)),
    # A frame without true boxes, and a box without area.
    ('w', 1): boxes((LEFT, 1, 0.9), ([0.3, 0.0, 0.3, 1.0], 1, 0.99)),
  }
  value, each = ava_metrics.frame_map(truth, found, [1, 2, 3])
  assert each == {1: pytest.approx(0.5), 2: 0.0}
  assert value == pytest.approx(0.25)
  value, _ = ava_metrics.frame_map(truth, found, [1], excluded=[('w', 1)])
  assert value == 1.0
  with pytest.raises(ValueError, match='found none in 2 frames'):
    ava_metrics.frame_map(truth, found, [3])


def test_files_of_the_official_layout(tmp_path):
  path = tmp_path / 'ava.csv'
  path.write_text(
    'v,0902,0.077,0.151,0.283,0.811,80,1\n'
    'v,0902,0.077,0.151,0.283,0.811,9,1\n'
    'v,0903,0.100,0.200,0.300,0.400,12\n'
  )
  read = ava_data.read_boxes(path)
  assert list(read) == [('v', 902), ('v', 903)]
  np.testing.assert_array_equal(read['v', 902].actions, [80, 9])
  np.testing.assert_array_equal(read['v', 902].scores, [1, 1])

  found = {('v', 902): boxes(([1 / 3, 0.0, 1.0, 0.5], 80, 0.25))}
  ava_data.write_boxes(tmp_path / 'found.csv', found)
  text = (tmp_path / 'found.csv').read_text().strip()
  assert text == 'v,0902,0.33333,0.00000,1.00000,0.50000,80,0.25000'
  back = ava_data.read_boxes(tmp_path / 'found.csv', scored=True)
  assert back['v', 902].scores == 0.25

  (tmp_path / 'excluded.csv').write_text('v,0903\n')
  assert ava_data.read_excluded(tmp_path / 'excluded.csv') == {('v', 903)}
  (tmp_path / 'map.pbtxt').write_text(
    'item {\n  name: "bend/bow"\n  id: 1\n}\n'
    'label {\n  name: "watch (e.g., TV)"\n  label_id: 80\n  label_type: X\n}\n'
  )
  names = ava_data.read_classes(tmp_path / 'map.pbtxt')
  assert names == {1: 'bend/bow', 80: 'watch (e.g., TV)'}


@pytest.mark.parametrize(
  ('row', 'message'),
  [
    ('v,0902,0.5,0.1,0.3,0.8,1', r'ava\.csv:2: the box ends before it starts'),
    ('v,0902,0.1,0.1,0.3,0.8,81', r'ava\.csv:2: unknown action 81'),
    ('v,0902,0.1,0.1,0.3,0.8', r'ava\.csv:2: expected .* found 6 columns'),
    ('v,0902,a,0.1,0.3,0.8,1', r'ava\.csv:2: no number'),
  ],
)
def test_wrong_rows_are_named(tmp_path, row, message):
  path = tmp_path / 'ava.csv'
  path.write_text(f'v,0901,0.1,0.1,0.3,0.8,1\n{row}\n')
  with pytest.raises(AnnotationError, match=message):
    ava_data.read_boxes(path)


def test_wrong_files_are_named(tmp_path):
  with pytest.raises(AnnotationError, match=r'gone\.csv: unreadable'):
    ava_data.read_boxes(tmp_path / 'gone.csv')
  path = tmp_path / 'one.csv'
  path.write_text('')
  with pytest.raises(AnnotationError, match=r'one\.csv: is empty'):
    ava_data.read_boxes(path)
  path.write_text('v\n')
  with pytest.raises(AnnotationError, match=r'one\.csv:1: expected video,time'):
    ava_data.read_excluded(path)
  with pytest.raises(AnnotationError, match=r'one\.csv: expected items'):
    ava_data.read_classes(path)


def test_stretch_keeps_the_key_frame_in_the_middle():
  frames = np.arange(40, dtype=np.uint8)[:, None, None, None]
  frames = np.broadcast_to(frames, (40, 2, 2, 3))

  def stretch(moment):
    reader = video.ArrayReader(frames, 10.0)
    return ava_data.Stretch(reader, moment, 0.8, 'film')

  with stretch(2.0) as s:
    assert s.num_frames == 8
    assert s.read(np.arange(8))[:, 0, 0, 0].tolist() == list(range(16, 24))
  with stretch(0.2) as s:
    assert s.read(np.arange(8))[:, 0, 0, 0].tolist() == [0, 0, 0, 1, 2, 3, 4, 5]
  with pytest.raises(video.DecodeError, match=r'film: second 9 is outside of'):
    stretch(9.0)


def test_key_frames_of_a_folder(tmp_path):
  csv = tmp_path / 'ava.csv'
  csv.write_text('v,0902,0.1,0.1,0.3,0.8,1\nw,0003,0.1,0.1,0.3,0.8,1\n')
  (tmp_path / 'v.mp4').write_bytes(b'x')
  (tmp_path / 'excluded.csv').write_text('w,0003\n')
  source = ava_data.KeyFrames(str(tmp_path), str(csv))
  assert source[0].id == 'v,0902'
  assert source.label_names == ()
  with pytest.raises(video.DecodeError, match='w: no such video in'):
    source[1]
  left = ava_data.KeyFrames(
    str(tmp_path), str(csv), str(tmp_path / 'excluded.csv')
  )
  assert len(left) == 1


def test_whole_frame_keeps_boxes_right():
  frames = np.zeros((2, 6, 8, 3), np.uint8)
  rng = np.random.default_rng(0)
  assert ava_data.whole_frame(frames, rng, size=4).shape == (2, 4, 4, 3)
